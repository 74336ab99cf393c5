//! An AWS KMS of real semantics for tests.
