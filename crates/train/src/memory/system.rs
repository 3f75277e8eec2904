//! What the system says of memory: what this process holds, and what there is to have.

use std::path::{Path, PathBuf};

use candle_core::Device;

use crate::Result;

/// A figure of a file whose lines are `KEY  N kB`.
fn kibibytes(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Memory that this process can still get, in bytes: what the system has free or can free, or what its control groups leave
/// of their limits, whichever is less.
pub fn available() -> Option<u64> {
    let group = std::fs::read_to_string("/proc/self/cgroup").ok();
    let left = group.and_then(|text| left_of_limits(Path::new("/sys/fs/cgroup"), &text));
    [kibibytes("/proc/meminfo", "MemAvailable:"), left].into_iter().flatten().min()
}

/// What the control groups named in `groups` (lines `N:CONTROLLERS:PATH`) leave of their limits, by the files under `root`.
/// File pages that can be dropped do not count as taken.
fn left_of_limits(root: &Path, groups: &str) -> Option<u64> {
    let mut least = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (base, files) = match controllers {
            "" => (root.to_owned(), ["memory.max", "memory.current", "inactive_file"]),
            c if c.split(',').any(|c| c == "memory") => {
                (root.join("memory"), ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"])
            }
            _ => continue,
        };
        let own: PathBuf = base.join(path.trim_start_matches('/'));
        for folder in own.ancestors().take_while(|folder| folder.starts_with(&base)) {
            least = [least, left_of(folder, files)].into_iter().flatten().min();
        }
    }
    least
}

fn left_of(folder: &Path, [limit, usage, idle]: [&str; 3]) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let limit = number(limit)?;
    let stat = read("memory.stat").unwrap_or_default();
    let droppable = stat.lines().find_map(|l| l.strip_prefix(idle)?.trim().parse::<u64>().ok()).unwrap_or(0);
    Some(limit.saturating_sub(number(usage)?.saturating_sub(droppable)))
}

/// Peak resident memory of this process so far, in bytes.
pub fn peak() -> Option<u64> {
    kibibytes("/proc/self/status", "VmHWM:")
}

/// Resident memory of this process now, in bytes.
pub fn resident() -> Option<u64> {
    kibibytes("/proc/self/status", "VmRSS:")
}

/// What of [`resident`] are pages of files: the program's code, and mapped files.
pub(super) fn file_pages() -> Option<u64> {
    kibibytes("/proc/self/status", "RssFile:")
}

/// Most memory in use at once so far: on a CUDA device what was allocated there, else what the process held, in bytes.
///
/// # Errors
/// If the device's driver refuses.
pub fn peak_on(device: &Device) -> Result<Option<u64>> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return Ok(espalier_kernels::cuda::peak_memory(device)?);
    }
    let _ = device;
    Ok(peak())
}

/// Memory that can still be had where the tensors of `device` are, in bytes.
///
/// # Errors
/// If the device's driver refuses.
pub fn available_on(device: &Device) -> Result<Option<u64>> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return Ok(espalier_kernels::cuda::free_memory(device)?);
    }
    let _ = device;
    Ok(available())
}

/// Tells the allocator of glibc to keep what is freed: every training step asks for the same large buffers again, and giving
/// them back to the system costs a page fault for each 4 KiB when they return. For buffers up to 32 MiB, the most that it allows.
/// And to have one arena for all threads: with several, what one frees another cannot use, and the memory of a run is a third
/// more or less by chance. To be called before other threads are there.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: settings of the allocator, which it takes at any time.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

/// Gives what is freed and kept back to the system, where the allocator is glibc's: once between loading and training, whose
/// buffers are of other sizes.
pub(super) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: a call without arguments that matter.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn files(folder: &Path, files: &[(&str, &str)]) {
        std::fs::create_dir_all(folder).unwrap();
        files.iter().for_each(|(name, text)| std::fs::write(folder.join(name), text).unwrap());
    }

    #[test]
    fn the_tightest_limit_on_the_way_up_counts_in_both_versions() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        files(
            &at("a/b"),
            &[("memory.max", "max\n"), ("memory.current", "10\n"), ("memory.stat", "anon 4\ninactive_file 6\n")],
        );
        files(
            &at("a"),
            &[("memory.max", "1000\n"), ("memory.current", "700\n"), ("memory.stat", "inactive_file 200\n")],
        );
        assert_eq!(left_of_limits(root.path(), "0::/a/b\n"), Some(500));
        assert_eq!(left_of_limits(root.path(), "0::/elsewhere\n"), None);
        files(
            &at("memory/c"),
            &[
                ("memory.limit_in_bytes", "400\n"),
                ("memory.usage_in_bytes", "390\n"),
                ("memory.stat", "total_inactive_file 90\n"),
            ],
        );
        assert_eq!(left_of_limits(root.path(), "4:memory:/c\n2:cpu:/a\n"), Some(100));
        assert_eq!(left_of_limits(root.path(), "4:cpu,memory:/c\n0::/a/b\n"), Some(100));
        assert_eq!(left_of_limits(root.path(), "no group at all"), None);
    }
}
