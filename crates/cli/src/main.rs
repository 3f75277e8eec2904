//! The espalier binary: parse, call, print.

mod commands;
mod output;
mod progress;
mod recipe_flags;

use std::process::ExitCode;

fn main() -> ExitCode {
    // The process clock starts before anything else, for the time to the first step.
    espalier_train::process_seconds();
    keep_freed_memory();
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

/// Tells the allocator of glibc to keep what is freed: every training step asks for the same large buffers again, and giving
/// them back to the system costs a page fault for each 4 KiB when they return. For buffers up to 32 MiB, the most that it allows.
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: two settings of the allocator, made before other threads exist.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}
