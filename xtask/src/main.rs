//! `cargo xtask tidy` checks the invariants; `cargo xtask docs` writes the generated documentation.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let root = xtask::root();
    match std::env::args().nth(1).as_deref() {
        Some("tidy") => {
            let faults = xtask::tidy::check(&root);
            faults.iter().for_each(|fault| eprintln!("{fault}"));
            if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Some("docs") => {
            for (path, text) in xtask::docs::pages(&root) {
                match std::fs::write(root.join(&path), text) {
                    Ok(()) => println!("{}", path.display()),
                    Err(e) => {
                        eprintln!("{}: {e}", path.display());
                        return ExitCode::FAILURE;
                    }
                }
            }
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("usage: cargo xtask tidy | docs");
            ExitCode::from(2)
        }
    }
}
