//! The program `keyfold`. Everything is in the library; `keyfold::cli` is where it begins.

use std::process::ExitCode;

#[cfg(feature = "zeroizing-allocator")]
#[global_allocator]
static ALLOCATOR: zeroizing_alloc::ZeroAlloc<mimalloc::MiMalloc> =
    zeroizing_alloc::ZeroAlloc(mimalloc::MiMalloc);

#[cfg(not(feature = "zeroizing-allocator"))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    keyfold::cli::main()
}
