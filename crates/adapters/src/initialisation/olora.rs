//! OLoRA: the factors start as the leading part of the base's QR decomposition, which leaves the base.
//!
//! Equation: W = Q R; B = Q[:, :r], A = R[:r, :]; the frozen part becomes W - s B A
//! Shapes:   W [d_out, d_in], A [r, d_in], B [d_out, r]
//! Source:   arXiv 2406.01775 algorithm 1; PEFT `init_lora_weights="olora"`
//! Cost:     one QR a layer, 2 d_in^2 d_out FLOPs; one more copy of the adapted weights

use serde::{Deserialize, Serialize};

use super::{Factors, Start, from_base};
use crate::adapter::{Init, Site};
use crate::{Result, decomposition};

/// OLoRA has no settings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Olora {}

impl Start for Olora {
    const MOVES_BASE: bool = true;

    fn factors(&self, site: &Site, scale: f64, init: &mut Init<'_>) -> Result<Factors> {
        from_base(site, scale, init, |weight| {
            let (q, r) = decomposition::qr(weight)?;
            Ok((q.narrow(1, 0, site.rank)?.contiguous()?, r.narrow(0, 0, site.rank)?.contiguous()?))
        })
    }
}
