//! PiSSA by randomised subspace iteration: as `pissa`, without a full decomposition.
//!
//! Equation: Q = orth((W W^T)^k W G), G normal; W ~ Q (Q^T W) = U S V^T; then as `pissa`
//! Shapes:   W [d_out, d_in], G [d_in, 2r], A [r, d_in], B [d_out, r]
//! Source:   arXiv 2404.02948 section 4 (fast SVD); Halko et al. arXiv 0909.4061 algorithm 4.4
//! Cost:     4 (2 k + 1) r d_in d_out FLOPs a layer; one more copy of the adapted weights

use serde::{Deserialize, Serialize};

use super::{Factors, Start, from_base, pissa};
use crate::adapter::{Init, Site, Source};
use crate::{Error, Result, decomposition, random};

/// Iterations k.
pub(super) const ITERATIONS: usize = 16;

/// Randomised PiSSA has no settings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PissaNiter {}

impl Start for PissaNiter {
    const MOVES_BASE: bool = true;

    fn factors(&self, site: &Site, scale: f64, init: &mut Init<'_>) -> Result<Factors> {
        let Source::Fresh { seed, .. } = init.source else {
            return Err(Error::config(
                "init_lora_weights",
                "factors from a randomised decomposition cannot be used without the residual they were made with; \
                 convert the adapter to plain LoRA where it was trained (PEFT: path_initial_model_for_weight_conversion)",
            ));
        };
        from_base(site, scale, init, |weight| {
            let mut rng = random::stream(seed, &format!("{}.pissa_niter", site.path));
            pissa::principal(decomposition::randomised_svd(weight, site.rank, ITERATIONS, &mut rng)?, site.rank, scale)
        })
    }
}
