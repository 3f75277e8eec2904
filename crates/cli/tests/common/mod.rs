//! Runs the binary with its cache in a folder of the test's own.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub(crate) fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../parity/golden")
}

pub(crate) fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_espalier"));
    command.env("ESPALIER_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache")).env("NO_COLOR", "1");
    command
}

pub(crate) fn run(args: &[&str]) -> Output {
    binary().args(args).output().unwrap()
}

/// Standard output of a call that must succeed.
pub(crate) fn ok(args: &[&str]) -> String {
    let out = run(args);
    assert!(out.status.success(), "{args:?}\n{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// The last line of standard output as JSON.
pub(crate) fn json(args: &[&str]) -> serde_json::Value {
    let text = ok(&[args, &["--json"]].concat());
    serde_json::from_str(text.lines().last().unwrap()).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Standard error of a call that must fail with `code`.
pub(crate) fn fails(code: i32, args: &[&str]) -> String {
    let out = run(args);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{args:?}\n{text}");
    text
}

pub(crate) fn text(path: &Path) -> String {
    path.display().to_string()
}

/// The report of `adapter check`, which must end with `code`.
pub(crate) fn check(code: i32, args: &[&str]) -> serde_json::Value {
    let out = run(&[&["adapter", "check"], args, &["--json"]].concat());
    let said = String::from_utf8(out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(code), "{args:?}: {said}\n{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_str(said.lines().last().unwrap_or("null")).unwrap_or_default()
}
