//! The attention part on a device.

use super::group::KeptOn;
use super::{BackOn, Flat, OnDevice, Rows, finish, normed};
use crate::attention::cuda::{Views, backward, forward, supports};
use crate::cuda::{Gpu, View};
use crate::part::AttentionPart;
use crate::rope::cuda::turn;
use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

/// What is kept of one pass: q, k and v side by side after rotation, the attention's output and ln-sums.
pub(in crate::part) struct Kept {
    qkv: Rows,
    out: Rows,
    log_sums: CudaSlice<f32>,
    inputs: KeptOn,
    output: KeptOn,
}

impl AttentionPart {
    /// Queries, keys and values within rows that hold them side by side.
    fn within(&self, rows: View) -> Views {
        let [q, k, _] = self.widths();
        Views { q: rows, k: rows.columns(q), v: rows.columns(q + k) }
    }

    fn turn_on(&self, gpu: &Gpu, rows: View, (b, t): (usize, usize), inverse: bool) -> Result<()> {
        let Some((cos, sin)) = &self.rotary else { return Ok(()) };
        turn(gpu, rows, (b * t, t, self.heads + self.kv_heads, self.head_dim), cos, sin, inverse)
    }
}

impl OnDevice for AttentionPart {
    type Kept = Kept;

    fn supports(&self, gpu: &Gpu, size: (usize, usize)) -> bool {
        let (inputs, output) = self.groups();
        inputs.is_aligned() && output.is_aligned() && supports(gpu, &self.dims(size), &self.spec)
    }

    fn forward_on(&self, gpu: &Gpu, x: View, flat: &Flat, size: (usize, usize)) -> Result<(Rows, Kept)> {
        let (inputs, output) = self.groups();
        let n = size.0 * size.1;
        let (rows, held) = normed(gpu, self.norm.as_ref(), x, (n, inputs.d_in))?;
        let qkv = Rows::new(gpu, n, inputs.d_out())?;
        let kept_inputs = inputs.forward_on(gpu, rows, n, flat, (None, qkv.view()), false)?;
        drop(held);
        self.turn_on(gpu, qkv.view(), size, false)?;
        let out = Rows::bordered(gpu, n, output.d_in)?;
        let log_sums = forward(gpu, &self.dims(size), &self.spec, self.within(qkv.view()), out.view())?;
        let y = Rows::new(gpu, n, output.d_out())?;
        let residual = self.residual.then_some(x);
        let kept_output = output.forward_on(gpu, out.input(), n, flat, (residual, y.view()), false)?;
        Ok((y, Kept { qkv, out, log_sums, inputs: kept_inputs, output: kept_output }))
    }

    fn backward_on(&self, gpu: &Gpu, saved: &Kept, back: &BackOn<'_>) -> Result<Option<Rows>> {
        let BackOn { x, g, flat, size, d_parameters, wants_x } = *back;
        let (inputs, output) = self.groups();
        let n = size.0 * size.1;
        let d_out = Rows::new(gpu, n, output.d_in)?;
        let to = (d_parameters, Some(d_out.view()));
        let d_inner = output.backward_on(gpu, (g, n), &saved.output, flat, to)?;
        output.down_on(gpu, (saved.out.view(), n), d_inner.as_ref(), d_parameters)?;
        let d_qkv = Rows::bordered(gpu, n, inputs.d_out())?;
        let (qkv, kept) = (self.within(saved.qkv.view()), (saved.out.view(), &saved.log_sums));
        backward(gpu, &self.dims(size), &self.spec, qkv, kept, d_out.view(), self.within(d_qkv.view()))?;
        drop(d_out);
        self.turn_on(gpu, d_qkv.view(), size, true)?;
        let (rows, _held) = normed(gpu, self.norm.as_ref(), x, (n, inputs.d_in))?;
        let dx = wants_x.then(|| Rows::new(gpu, n, inputs.d_in)).transpose()?;
        let to = (d_parameters, dx.as_ref().map(Rows::view));
        let d_inner = inputs.backward_on(gpu, (d_qkv.input(), n), &saved.inputs, flat, to)?;
        inputs.down_on(gpu, (rows.view, n), d_inner.as_ref(), d_parameters)?;
        let residual = self.residual.then_some(g.view);
        dx.map(|dx| finish(gpu, self.norm.as_ref(), (x, dx), residual, (n, inputs.d_in))).transpose()
    }
}
