//! The keyfold ciphertext format.
