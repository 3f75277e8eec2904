//! Function multiversioning: one loop, compiled for AVX-512, AVX2+FMA and the baseline, chosen once at run time.
//!
//! `multiversion! { fn name[FMA](args) -> T { body } }` defines `name` with `FMA: bool` in scope: whether `mul_add` is one
//! instruction. The body is plain Rust over slices that the compiler vectorises for each level.

/// What the running processor offers.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// SSE2 only.
    Baseline,
    /// AVX2 and FMA.
    V3,
    /// AVX-512 F, BW, DQ, VL.
    V4,
    /// That and products of bf16 pairs.
    V4Bf16,
}

/// The level of this machine, detected once; [`VARIABLE`] asks for a lower one.
#[cfg(target_arch = "x86_64")]
pub(crate) fn level() -> Level {
    static LEVEL: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
    *LEVEL.get_or_init(|| {
        let v3 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let v4 = v3
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        let found = match (v4, v3) {
            (true, _) if is_x86_feature_detected!("avx512bf16") => Level::V4Bf16,
            (true, _) => Level::V4,
            (_, true) => Level::V3,
            _ => Level::Baseline,
        };
        let asked = std::env::var(VARIABLE).ok();
        let asked = asked.and_then(|name| NAMES.iter().find(|(known, _)| *known == name).map(|(_, level)| *level));
        asked.map_or(found, |asked| found.min(asked))
    })
}

/// The variable that asks for fewer instructions than the processor has.
const VARIABLE: &str = "ESPALIER_SIMD";

/// Its values.
const NAMES: [(&str, Level); 4] =
    [("baseline", Level::Baseline), ("avx2", Level::V3), ("avx512", Level::V4), ("avx512bf16", Level::V4Bf16)];

/// The instructions that the kernels use on this machine.
///
/// # Errors
/// If `ESPALIER_SIMD` holds a value that is none of the known ones; the message lists them.
pub fn instructions() -> std::result::Result<&'static str, String> {
    if let Ok(asked) = std::env::var(VARIABLE)
        && NAMES.iter().all(|(known, _)| *known != asked)
    {
        let known: Vec<&str> = NAMES.iter().map(|(known, _)| *known).collect();
        return Err(format!("{VARIABLE}={asked} is not known (known: {})", known.join(", ")));
    }
    Ok(NAMES.iter().find(|(_, known)| *known == level()).map_or("baseline", |(name, _)| name))
}

/// Everything but x86 takes the portable loops.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn level() -> Level {
    Level::Baseline
}

/// Whether products of bf16 pairs are one instruction.
pub(crate) fn has_bf16() -> bool {
    level() == Level::V4Bf16
}

macro_rules! multiversion {
    ($(#[$meta:meta])* fn $name:ident[$fma:ident]($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        pub(crate) fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn generic<const $fma: bool>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn v4($($arg: $ty),*) $(-> $ret)? {
                    generic::<true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn v3($($arg: $ty),*) $(-> $ret)? {
                    generic::<true>($($arg),*)
                }
                match $crate::simd::level() {
                    // SAFETY: `level` has seen these features on this processor.
                    $crate::simd::Level::V4 | $crate::simd::Level::V4Bf16 => return unsafe { v4($($arg),*) },
                    // SAFETY: as above.
                    $crate::simd::Level::V3 => return unsafe { v3($($arg),*) },
                    $crate::simd::Level::Baseline => {}
                }
            }
            generic::<{ cfg!(target_arch = "aarch64") }>($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// `a * b + c`, fused where that is one instruction.
#[inline(always)]
pub(crate) fn madd<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}
