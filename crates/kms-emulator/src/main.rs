//! The emulator program.
fn main() {}
