//! What operators type while the service runs.
