//! The feed-forward part on a device.

use super::group::KeptOn;
use super::{BackOn, Flat, OnDevice, Rows, finish, normed};
use crate::activation::cuda::{backward, forward, gained_backward, gated_backward, gated_forward};
use crate::cuda::{Gpu, View};
use crate::part::{FeedForwardPart, Projection};
use candle_core::Result;

/// What is kept of one pass: gate and up side by side, or the one output, before the nonlinearity.
pub(in crate::part) struct Kept {
    hidden: Rows,
    inputs: KeptOn,
    output: KeptOn,
}

impl FeedForwardPart {
    /// Whether gains of gate and up are left to the activation's kernels.
    fn defers(&self) -> bool {
        let gained = |p: &Projection| p.low_rank.as_ref().is_some_and(|l| l.gain.is_some());
        self.gated
            && self.inputs.len() == 2
            && self.inputs.iter().any(gained)
            && self.inputs.iter().all(|p| p.bias.is_none())
    }
}

impl OnDevice for FeedForwardPart {
    type Kept = Kept;

    fn supports(&self, _: &Gpu, (b, t): (usize, usize)) -> bool {
        let (inputs, output) = self.groups();
        inputs.is_aligned() && output.is_aligned() && i32::try_from(b * t).is_ok()
    }

    fn forward_on(&self, gpu: &Gpu, x: View, flat: &Flat, size: (usize, usize)) -> Result<(Rows, Kept)> {
        let (inputs, output) = self.groups();
        let n = size.0 * size.1;
        let (rows, held) = normed(gpu, self.norm.as_ref(), x, (n, inputs.d_in))?;
        let hidden = Rows::new(gpu, n, inputs.d_out())?;
        let kept_inputs = inputs.forward_on(gpu, rows, n, flat, (None, hidden.view()), self.defers())?;
        drop(held);
        let (inner, width) = (Rows::bordered(gpu, n, output.d_in)?, output.d_in);
        let from = hidden.view();
        if self.gated {
            let gains = if self.defers() { (kept_inputs.gain(0).values, kept_inputs.gain(1).values) } else { (0, 0) };
            gated_forward(gpu, self.activation, (from, from.columns(width)), gains, inner.view(), (n, width))?;
        } else {
            forward(gpu, self.activation, from, inner.view(), (n, width))?;
        }
        let y = Rows::new(gpu, n, output.d_out())?;
        let residual = self.residual.then_some(x);
        let kept_output = output.forward_on(gpu, inner.input(), n, flat, (residual, y.view()), false)?;
        Ok((y, Kept { hidden, inputs: kept_inputs, output: kept_output }))
    }

    fn backward_on(&self, gpu: &Gpu, saved: &Kept, back: &BackOn<'_>) -> Result<Option<Rows>> {
        let BackOn { x, g, flat, size, d_parameters, wants_x } = *back;
        let (inputs, output) = self.groups();
        let n = size.0 * size.1;
        let width = output.d_in;
        // The inner rows are needed for the gradient of A only; they come with that of the hidden ones.
        let (d_rows, inner) = (Rows::new(gpu, n, width)?, Rows::new(gpu, n, width)?);
        let d_hidden = Rows::bordered(gpu, n, inputs.d_out())?;
        let to = (d_parameters, Some(d_rows.view()));
        let d_inner = output.backward_on(gpu, (g, n), &saved.output, flat, to)?;
        let (from, to) = (saved.hidden.view(), d_hidden.view());
        if self.gated {
            let (ins, outs) = ((from, from.columns(width)), (to, to.columns(width)));
            if self.defers() {
                let place = |i: usize| inputs.places[i].gain.as_ref().map(|g| g.start);
                let d_gain = |i| d_parameters.zip(place(i)).map_or(0, |(d, at)| d + (at * size_of::<f32>()) as u64);
                let gains = ([saved.inputs.gain(0), saved.inputs.gain(1)], [d_gain(0), d_gain(1)]);
                let outs = (outs.0, outs.1, inner.view());
                gained_backward(gpu, self.activation, ins, gains, d_rows.view(), outs, (n, width))?;
            } else {
                gated_backward(gpu, self.activation, ins, d_rows.view(), outs, inner.view(), (n, width))?;
            }
        } else {
            backward(gpu, self.activation, from, d_rows.view(), to, inner.view(), (n, width))?;
        }
        drop(d_rows);
        output.down_on(gpu, (inner.view(), n), d_inner.as_ref(), d_parameters)?;
        drop(inner);
        let (rows, _held) = normed(gpu, self.norm.as_ref(), x, (n, inputs.d_in))?;
        let dx = wants_x.then(|| Rows::new(gpu, n, inputs.d_in)).transpose()?;
        let to = (d_parameters, dx.as_ref().map(Rows::view));
        let d_inner = inputs.backward_on(gpu, (d_hidden.input(), n), &saved.inputs, flat, to)?;
        inputs.down_on(gpu, (rows.view, n), d_inner.as_ref(), d_parameters)?;
        let residual = self.residual.then_some(g.view);
        dx.map(|dx| finish(gpu, self.norm.as_ref(), (x, dx), residual, (n, inputs.d_in))).transpose()
    }
}
