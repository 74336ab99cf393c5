//! keyfold.
fn main() {}
