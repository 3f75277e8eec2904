//! The espalier binary: parse, call, print.

mod commands;
mod output;
mod progress;
mod recipe_flags;

use std::process::ExitCode;

fn main() -> ExitCode {
    // The process clock starts before anything else, for the time to the first step.
    espalier_train::process_seconds();
    commands::run(std::env::args_os())
}
