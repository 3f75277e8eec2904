//! Named random sub-streams: one seed, one stream per purpose and counter, the same on every machine.
//!
//! Equation: ChaCha8 key = SHA-256(name, 0, seed, counters); an index below n is drawn by rejection, so it is exactly uniform.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

/// The stream `name` of `seed`, number `counters`.
pub(crate) fn stream(seed: u64, name: &str, counters: &[u64]) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(name.as_bytes());
    hash.update([0]);
    hash.update(seed.to_le_bytes());
    for counter in counters {
        hash.update(counter.to_le_bytes());
    }
    ChaCha8Rng::from_seed(hash.finalize().into())
}

/// A uniform number in `0..n`; 0 for n = 0.
fn below(rng: &mut ChaCha8Rng, n: u64) -> u64 {
    if n < 2 {
        return 0;
    }
    let limit = u64::MAX - (u64::MAX % n + 1) % n;
    loop {
        let draw = rng.next_u64();
        if draw <= limit {
            return draw % n;
        }
    }
}

/// Fisher-Yates shuffle.
pub(crate) fn shuffle<T>(items: &mut [T], rng: &mut ChaCha8Rng) {
    for i in (1..items.len()).rev() {
        items.swap(i, below(rng, i as u64 + 1) as usize);
    }
}
