//! The espalier binary: parse, call, print.

mod commands;
mod output;
mod progress;
mod recipe_flags;

use std::process::ExitCode;

/// Counts what is in use, from which a run's memory is told before it starts.
#[global_allocator]
static ALLOCATOR: espalier_train::memory::Counting = espalier_train::memory::Counting;

fn main() -> ExitCode {
    // The process clock starts before anything else, for the time to the first step.
    espalier_train::process_seconds();
    espalier_train::memory::keep_freed();
    // On a thread of the pool: a parallel loop then starts where it is called, and only others must be woken for it. The
    // command needs the stack that a main thread has.
    let instructions = espalier_kernels::instructions().map_err(anyhow::Error::msg);
    let pool = rayon::ThreadPoolBuilder::new().stack_size(16 << 20).build_global();
    if let Err(error) = instructions.and_then(|_| Ok(pool?)) {
        output::error(&error, None);
        return ExitCode::from(2);
    }
    rayon::scope(|_| commands::run(std::env::args_os()))
}
