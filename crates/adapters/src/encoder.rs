//! Small networks that make virtual tokens out of trained vectors: layers with biases, and a bidirectional LSTM before them.
//!
//! Equation: x_{i+1} = act(W x_i + b), none after the last; LSTM: (i, f, g, o) = W x_t + b + U h_{t-1} + d,
//!           c_t = σ(f) c_{t-1} + σ(i) tanh(g), h_t = σ(o) tanh(c_t), each layer forwards and backwards
//! Shapes:   x [n, width] -> [n, width of the last layer]
//! Source:   PEFT's prompt encoders, which are torch's `Linear` and `LSTM` with their starts: uniform within 1 / sqrt(inputs),
//!           and within 1 / sqrt(hidden)

use candle_core::{Device, Shape, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::adapter::{Init, Shared};
use crate::{Flow, Result};

/// Prefix of the names of an encoder's parameters, as PEFT has them while it trains.
const PREFIX: &str = "prompt_encoder";

/// A trained tensor of an encoder.
pub(crate) fn part(
    init: &mut Init<'_>,
    name: &str,
    shape: impl Into<Shape>,
    draw: impl FnOnce(&mut ChaCha8Rng, &Shape, &Device) -> Result<Tensor>,
) -> Result<Tensor> {
    init.shared(&format!("{PREFIX}.{name}"), shape, Shared::Trained, draw)
}

/// Uniform within 1 / sqrt(`width`).
fn uniform(width: usize) -> impl Fn(&mut ChaCha8Rng, &Shape, &Device) -> Result<Tensor> {
    let bound = 1.0 / (width as f64).sqrt();
    move |rng, shape, device| {
        let values: Vec<f32> = (0..shape.elem_count()).map(|_| rng.random_range(-bound..bound) as f32).collect();
        Ok(Tensor::from_vec(values, shape, device)?)
    }
}

/// What stands between layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Between {
    Relu,
    Tanh,
}

/// Layers one after the other.
#[derive(Debug)]
pub(crate) struct Layers {
    layers: Vec<(Tensor, Tensor)>,
    between: Between,
}

impl Layers {
    /// Layers called `name` of these widths; they are numbered with what stands between them, as torch does. A last layer of
    /// `zeros` starts at 0.
    pub(crate) fn new(
        init: &mut Init<'_>,
        name: &str,
        widths: &[usize],
        between: Between,
        zeros: bool,
    ) -> Result<Self> {
        let last = widths.len().saturating_sub(2);
        let layer = |(i, pair): (usize, &[usize])| {
            let at_zero = zeros && i == last;
            let draw = |rng: &mut ChaCha8Rng, shape: &Shape, device: &Device| match at_zero {
                true => Ok(Tensor::zeros(shape, candle_core::DType::F32, device)?),
                false => uniform(pair[0])(rng, shape, device),
            };
            let weight = part(init, &format!("{name}.{}.weight", 2 * i), (pair[1], pair[0]), draw)?;
            let bias = part(init, &format!("{name}.{}.bias", 2 * i), pair[1], draw)?;
            Ok((weight, bias))
        };
        Ok(Self { layers: widths.windows(2).enumerate().map(layer).collect::<Result<_>>()?, between })
    }

    /// `x` [n, first width] -> [n, last width].
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, (weight, bias)) in self.layers.iter().enumerate() {
            if i > 0 {
                x = match self.between {
                    Between::Relu => x.relu()?,
                    Between::Tanh => x.tanh()?,
                };
            }
            x = x.matmul(&weight.t()?)?.broadcast_add(bias)?;
        }
        Ok(x)
    }
}

/// One direction of one layer: W, U, b and d.
#[derive(Debug)]
struct Direction {
    input: Tensor,
    hidden: Tensor,
    bias: Tensor,
}

impl Direction {
    fn new(init: &mut Init<'_>, name: &str, ending: &str, width: usize, hidden: usize) -> Result<(Self, Tensor)> {
        let mut of = |what: &str, shape: Shape| part(init, &format!("{name}.{what}_{ending}"), shape, uniform(hidden));
        let input = of("weight_ih", (4 * hidden, width).into())?;
        let recurrent = of("weight_hh", (4 * hidden, hidden).into())?;
        let (bias, other) = (of("bias_ih", (4 * hidden).into())?, of("bias_hh", (4 * hidden).into())?);
        Ok((Self { input, hidden: recurrent, bias }, other))
    }
}

/// A bidirectional LSTM of several layers.
#[derive(Debug)]
pub(crate) struct Lstm {
    layers: Vec<[(Direction, Tensor); 2]>,
    hidden: usize,
    dropout: f64,
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok((x.neg()?.exp()? + 1.0)?.recip()?)
}

impl Lstm {
    /// `layers` layers called `name` from `width` to 2 `hidden`, with dropout between them.
    pub(crate) fn new(
        init: &mut Init<'_>,
        name: &str,
        (width, hidden, layers): (usize, usize, usize),
        dropout: f64,
    ) -> Result<Self> {
        let layer = |i: usize| {
            let width = if i == 0 { width } else { 2 * hidden };
            let forwards = Direction::new(init, name, &format!("l{i}"), width, hidden)?;
            Ok([forwards, Direction::new(init, name, &format!("l{i}_reverse"), width, hidden)?])
        };
        Ok(Self { layers: (0..layers).map(layer).collect::<Result<_>>()?, hidden, dropout })
    }

    /// `x` [n, width] -> [n, 2 hidden].
    pub(crate) fn forward(&self, x: &Tensor, flow: &Flow) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, [forwards, backwards]) in self.layers.iter().enumerate() {
            if i > 0 {
                x = flow.dropout(&x, self.dropout, &format!("{PREFIX} (between layers {i})"))?;
            }
            x = Tensor::cat(&[self.run(forwards, &x, false)?, self.run(backwards, &x, true)?], 1)?;
        }
        Ok(x)
    }

    fn run(&self, (part, other): &(Direction, Tensor), x: &Tensor, reverse: bool) -> Result<Tensor> {
        let (n, h) = (x.dim(0)?, self.hidden);
        let inputs = x.matmul(&part.input.t()?)?.broadcast_add(&(&part.bias + other)?)?;
        let mut state = Tensor::zeros((1, h), x.dtype(), x.device())?;
        let mut cell = state.clone();
        let mut out = Vec::with_capacity(n);
        for step in 0..n {
            let at = if reverse { n - 1 - step } else { step };
            let gates = (inputs.narrow(0, at, 1)? + state.matmul(&part.hidden.t()?)?)?;
            let gate = |i: usize| gates.narrow(1, i * h, h);
            let kept = (sigmoid(&gate(1)?)? * &cell)?;
            cell = (kept + (sigmoid(&gate(0)?)? * gate(2)?.tanh()?)?)?;
            state = (sigmoid(&gate(3)?)? * cell.tanh()?)?;
            out.push(state.clone());
        }
        if reverse {
            out.reverse();
        }
        Ok(Tensor::cat(&out, 0)?)
    }
}
