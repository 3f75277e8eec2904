//! `cargo xtask tidy` checks the invariants; `cargo xtask docs` writes the generated documentation; `cargo xtask trial` tries
//! what is promised; `cargo xtask supply` prints the bill of materials.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod trial;

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
        Some("trial") => trial::command(&root, &std::env::args().skip(2).collect::<Vec<_>>()),
        Some("supply") => match espalier_trials::supply::bill() {
            Ok(bill) => {
                println!("{bill:#}");
                ExitCode::SUCCESS
            }
            Err(e) => {
                eprintln!("{e:#}");
                ExitCode::FAILURE
            }
        },
        Some(trial::WORKER) => {
            match std::env::args_os().nth(2).map(|job| espalier_trials::worker::main(job.as_ref())) {
                Some(Ok(())) => ExitCode::SUCCESS,
                Some(Err(e)) => {
                    eprintln!("{e:#}");
                    ExitCode::FAILURE
                }
                None => ExitCode::from(2),
            }
        }
        _ => {
            eprintln!("usage: cargo xtask tidy | docs | trial | supply");
            ExitCode::from(2)
        }
    }
}
