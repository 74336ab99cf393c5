//! The recipes of `examples/clients`, as their readers run them.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use super::noise;
use crate::service::World;

/// Runs a recipe on a file of this many bytes, and gives the folder that it has worked in.
async fn run(program: &str, args: &[&str], recipe: &str, file_bytes: usize) -> TempDir {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report");
    let message = noise(file_bytes);
    std::fs::write(&file, &message).unwrap();
    let mut command = Command::new(program);
    command.args(args);
    if !recipe.is_empty() {
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/clients").join(recipe));
    }
    command.arg(&file).current_dir(folder.path());
    command.env("KEYFOLD_URL", format!("http://{}", service.address)).env("KEYFOLD_API_KEY", caller.token());
    // Off the runtime's threads, on which the service runs.
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{recipe}: {}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("field, file and batch: done"));
    assert!(std::fs::read(folder.path().join("report.out")).unwrap() == message);
    let sealed = std::fs::read(folder.path().join("report.kf")).unwrap();
    assert!(envelope::inspect(&sealed).is_ok());
    service.stop().await;
    folder
}

/// What a recipe wrote into a row of its database is encrypted.
fn holds_a_sealed_field(folder: &TempDir) {
    let database = std::fs::read(folder.path().join("report.db")).unwrap();
    let holds = |text: &str| memchr::memmem::find(&database, text.as_bytes()).is_some();
    assert!(holds("people") && holds("kf1.") && !holds("Lovelace"));
}

/// More than all buffers between a client and a service hold: who does not read while he sends comes to a stop.
const LARGE: usize = 24 << 20;

/// What the service holds back of its answer: who sends all before he reads can send this much.
const SMALL: usize = 1_000_000;

fn python() -> String {
    #[expect(clippy::disallowed_methods, reason = "which Python the tests use is the environment's to say")]
    std::env::var("KEYFOLD_TEST_PYTHON").expect(
        "KEYFOLD_TEST_PYTHON must name a Python that has the packages of tests/requirements.txt: scripts/test makes one",
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn curl() {
    run("bash", &[], "curl.sh", LARGE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn python_with_requests() {
    holds_a_sealed_field(&run(&python(), &[], "python_requests.py", SMALL).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn python_with_httpx() {
    holds_a_sealed_field(&run(&python(), &[], "python_httpx.py", SMALL).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn python_with_aiohttp() {
    holds_a_sealed_field(&run(&python(), &[], "python_aiohttp.py", LARGE).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn node() {
    run("node", &[], "node.mjs", LARGE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn java() {
    run("java", &[], "Recipes.java", SMALL).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn go() {
    run("go", &["run"], "recipes.go", LARGE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rust_with_reqwest() {
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--locked", "--offline", "--example", "client_reqwest"]);
    build.current_dir(env!("CARGO_MANIFEST_DIR"));
    let built = tokio::task::spawn_blocking(move || build.output().unwrap()).await.unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let tests = std::env::current_exe().unwrap();
    let example = tests.parent().unwrap().with_file_name("examples").join("client_reqwest");
    run(example.to_str().unwrap(), &[], "", LARGE).await;
}
