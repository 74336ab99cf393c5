//! A server that sends back what it gets: the same sockets, runtime and allocator as keyfold, and no work. What it costs
//! is what any service of this stack costs; `scripts/bench` measures keyfold against it.
//!
//! Prints its address, then serves until it is killed.
#![allow(clippy::print_stdout, reason = "the address is the program's one line of output")]

use std::net::TcpListener;

use axum::body::Bytes;
use axum::response::IntoResponse;
use axum::routing::post;
use keyfold::http::server::{Options, ServerHandle, serve};

#[global_allocator]
static ALLOCATOR: zeroizing_alloc::ZeroAlloc<mimalloc::MiMalloc> =
    zeroizing_alloc::ZeroAlloc(mimalloc::MiMalloc);

async fn echo(body: Bytes) -> impl IntoResponse {
    ([(http::header::CONTENT_TYPE, "application/json")], body)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        println!("echo on http://{}", listener.local_addr()?);
        // The default limit of a body is smaller than what the bench may send.
        let router = axum::Router::new()
            .route("/echo", post(echo))
            .layer(axum::extract::DefaultBodyLimit::max(Options::default().head_bytes_max << 10));
        serve(listener, router, &Options::default(), ServerHandle::default()).await?;
        Ok(())
    })
}
