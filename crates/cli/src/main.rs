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
    // On a thread of the pool: a parallel loop then starts where it is called, and only others must be woken for it.
    rayon::scope(|_| commands::run(std::env::args_os()))
}

/// Tells the allocator of glibc to keep what is freed: every training step asks for the same large buffers again, and giving
/// them back to the system costs a page fault for each 4 KiB when they return.
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: two settings of the allocator, made before other threads exist.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}
