//! keyfold.
