//! A run that does not fit into memory is refused before anything is written.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::atomic::AtomicBool;

use common::{recipe, write_rows};
use espalier_train::session::{self, SessionOptions};
use espalier_train::trainer::Scope;
use espalier_train::{Error, Run, Silent};

#[test]
fn too_little_memory_is_refused_with_what_would_help_and_allowed_where_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, out) = (dir.path().join("rows.jsonl"), dir.path().join("run"));
    write_rows(&rows, 8);
    let mut run = Run::prepare(recipe(&rows, &out)).unwrap();
    let mut plan = run.plan(0).unwrap();
    assert!(plan.memory.total > 0 && plan.memory.available.is_none_or(|n| n > 0));
    let wanted = plan.memory.total - plan.memory.held;
    let mut options = SessionOptions {
        scope: Scope::Adapter,
        resume: false,
        overwrite: false,
        allow_memory: false,
        command: String::new(),
    };
    plan.memory.available = Some(wanted - 1);
    let error = session::run(&mut run, &plan, &options, &mut Silent, &AtomicBool::new(false)).unwrap_err();
    assert!(matches!(error, Error::Memory { available, .. } if available == wanted - 1), "{error}");
    let hint = error.hint().unwrap();
    for help in ["batch_size", "max_length", "checkpointing", "quantization", "--allow-memory"] {
        assert!(hint.contains(help), "{hint}");
    }
    assert!(!out.exists(), "something was written");
    options.allow_memory = true;
    session::run(&mut run, &plan, &options, &mut Silent, &AtomicBool::new(false)).unwrap();
    std::fs::remove_dir_all(&out).unwrap();
    plan.memory.available = Some(wanted);
    options.allow_memory = false;
    let mut run = Run::prepare(recipe(&rows, &out)).unwrap();
    session::run(&mut run, &plan, &options, &mut Silent, &AtomicBool::new(false)).unwrap();
}
