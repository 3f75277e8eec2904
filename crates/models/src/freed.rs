//! Memory that was freed goes back to the system: an allocator keeps it for later else, and what a program holds is then what its
//! largest part took once, not what its present one needs.

/// Gives freed memory back, where the allocator has a call for it (glibc).
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the call takes no pointer and may be made at any time from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
