//! The most memory that the program had over stretches of its work, pages of mapped files included: what the system itself counted.

use espalier_models::freed::give_back;
use serde::Serialize;

/// Largest resident sizes, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Peaks {
    /// Before anything of this was done: the program itself.
    pub floor: u64,
    /// While the files were written.
    pub write: u64,
    /// While scores were computed, before and after that.
    pub verification: u64,
}

/// Begins a new count, where the system can (Linux).
pub fn reset() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn field(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// Largest resident size since [`reset`], or since the program began.
pub fn peak() -> Option<u64> {
    field("VmHWM")
}

/// Counts stretch by stretch; gives nothing where the system cannot begin anew.
#[derive(Debug)]
pub struct Counter {
    peaks: Option<Peaks>,
}

impl Counter {
    /// Begins; what there is now is the floor.
    pub fn begin() -> Self {
        give_back();
        let peaks = field("VmRSS").filter(|_| reset()).map(|floor| Peaks { floor, ..Peaks::default() });
        Self { peaks }
    }

    /// Ends a stretch, notes it by `place` and begins the next one.
    pub fn end(&mut self, place: impl FnOnce(&mut Peaks) -> &mut u64) {
        let most = peak();
        // What this stretch freed is not counted in the next one.
        give_back();
        self.peaks = self.peaks.take().zip(most).filter(|_| reset()).map(|(mut peaks, most)| {
            let place = place(&mut peaks);
            *place = most.max(*place);
            peaks
        });
    }

    /// All stretches.
    pub fn peaks(&self) -> Option<Peaks> {
        self.peaks
    }
}

impl Peaks {
    /// The figures for people.
    pub fn fact(&self) -> (String, String) {
        let mib = |n: u64| format!("{:.1} MiB", n as f64 / f64::from(1 << 20));
        let Self { floor, write, verification } = *self;
        let text = format!("{} to write, {} to compare ({} before)", mib(write), mib(verification), mib(floor));
        ("Most memory".to_owned(), text)
    }
}
