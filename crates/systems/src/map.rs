//! One frozen linear map with an adapter: the smallest model on which a claim can be tried.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use espalier_adapters::attach::attach_from_data;
use espalier_adapters::random::{normal, stream};
use espalier_adapters::{
    AdapterConfig, AdapterSet, Flow, FrozenWeight, Host, Linear, MethodConfig, ModuleMut, ParameterMap,
};
use espalier_train::Recipe;
use espalier_train::optimizer::{NO_HOLDS, Optimizer, Step};

/// A tensor of N(0, std^2), by seed and name.
pub fn draw(seed: u64, name: &str, std: f64, shape: (usize, usize)) -> Result<Tensor> {
    Ok(normal(&mut stream(seed, name), std, shape, &Device::Cpu)?)
}

/// A method from its settings in TOML.
pub fn method(settings: &str) -> Result<MethodConfig> {
    Ok(toml::from_str(settings)?)
}

/// |t| in Frobenius norm, in f64.
pub fn norm(t: &Tensor) -> Result<f64> {
    Ok(t.detach().to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

/// |a - b| / |b|, or |a - b| where b is 0.
pub fn apart(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.detach().to_dtype(DType::F64)?, b.detach().to_dtype(DType::F64)?);
    let (difference, size) = (norm(&(a - &b)?)?, norm(&b)?);
    Ok(if size > 0.0 { difference / size } else { difference })
}

/// Number of singular values above `share` of the largest.
pub fn rank(t: &Tensor, share: f64) -> Result<usize> {
    let (_, s, _) = espalier_adapters::decomposition::svd(&t.detach())?;
    let largest = s.first().copied().unwrap_or_default();
    Ok(s.iter().filter(|s| **s > share * largest).count())
}

struct Host1(Linear);

impl Host for Host1 {
    fn walk(
        &mut self,
        visit: &mut dyn FnMut(ModuleMut<'_>) -> espalier_adapters::Result<()>,
    ) -> espalier_adapters::Result<()> {
        visit(ModuleMut::Linear(&mut self.0))
    }

    fn head_paths(&self) -> Vec<String> {
        Vec::new()
    }

    fn base_hash(&self) -> espalier_adapters::Result<String> {
        Ok("map".to_owned())
    }
}

/// A frozen map with an adapter on it.
pub struct Map {
    host: Host1,
    set: AdapterSet,
    /// W [d_out, d_in].
    pub weight: Tensor,
    /// The adapter's parameters, by their names in files.
    pub parameters: ParameterMap,
}

/// Path of the one module.
const PATH: &str = "layers.0.map";

impl Map {
    /// `method` on the frozen `weight` [d_out, d_in], in its dtype; `evidence` is what a method that starts from data is given.
    ///
    /// # Errors
    /// If the method does not fit.
    pub fn new(weight: &Tensor, method: MethodConfig, seed: u64, evidence: Option<&Tensor>) -> Result<Self> {
        let mut host = Host1(Linear::new(PATH, FrozenWeight::dense(weight.clone())?, None, false)?);
        let config = AdapterConfig::new(method);
        let mut given = |site: &espalier_adapters::Site| {
            evidence.cloned().ok_or_else(|| espalier_adapters::Error::unsupported(&site.path, "no evidence was given"))
        };
        let attached = attach_from_data(&mut host, &config, (seed, 1.0), weight.dtype(), &Device::Cpu, &mut given)?;
        let parameters = attached.parameters.clone();
        let mut set = AdapterSet::new();
        set.add("a", attached)?;
        set.activate(&mut host, &[("a", 1.0)])?;
        Ok(Self { host, set, weight: weight.clone(), parameters })
    }

    /// The parameter whose name ends so.
    ///
    /// # Errors
    /// If there is none.
    pub fn parameter(&self, ending: &str) -> Result<Tensor> {
        let found = self.parameters.iter().find(|p| p.name.ends_with(ending));
        found.map(|p| p.tensor.clone()).ok_or_else(|| anyhow::anyhow!("no parameter ends with {ending}"))
    }

    /// Sets the trainable parameter whose name ends so.
    ///
    /// # Errors
    /// If there is none, or the shape is another.
    pub fn set(&self, ending: &str, values: &Tensor) -> Result<()> {
        let found = self.parameters.trainable().find(|p| p.name.ends_with(ending));
        let found = found.ok_or_else(|| anyhow::anyhow!("no trainable parameter ends with {ending}"))?;
        Ok(found.var()?.set(&values.to_dtype(found.tensor.dtype())?)?)
    }

    /// Moves every trainable parameter by N(0, std^2).
    ///
    /// # Errors
    /// If the device refuses.
    pub fn scatter(&self, seed: u64, std: f64) -> Result<()> {
        for p in self.parameters.trainable() {
            let noise = normal(&mut stream(seed, &p.name), std, p.tensor.shape(), &Device::Cpu)?;
            p.var()?.set(&(p.tensor.detach() + noise.to_dtype(p.tensor.dtype())?)?)?;
        }
        Ok(())
    }

    /// The adapted output of rows `x` [n, d_in], on the tape.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.host.0.forward(x, &Flow::eval())?)
    }

    /// The change of the weight [d_out, d_in], as merging has it.
    ///
    /// # Errors
    /// If there is none.
    pub fn delta(&self) -> Result<Tensor> {
        let adapter = self.host.0.adapter().ok_or_else(|| anyhow::anyhow!("no adapter acts"))?;
        adapter.delta(self.host.0.base())?.ok_or_else(|| anyhow::anyhow!("the change is no weight"))
    }

    /// The change of the weight as the forward pass has it: the adapted identity less W.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn acting_delta(&self) -> Result<Tensor> {
        let d_in = self.weight.dim(1)?;
        let eye = Tensor::eye(d_in, self.weight.dtype(), &Device::Cpu)?;
        Ok((self.forward(&eye)?.t()? - &self.weight)?.detach())
    }

    /// Gradients of `loss(forward(x))` by the ending of a parameter's name.
    ///
    /// # Errors
    /// If the loss cannot be differentiated.
    pub fn gradient(&self, x: &Tensor, loss: impl FnOnce(&Tensor) -> Result<Tensor>, ending: &str) -> Result<Tensor> {
        let grads = loss(&self.forward(x)?)?.backward()?;
        let of = self.parameter(ending)?;
        grads.get(&of).cloned().ok_or_else(|| anyhow::anyhow!("no gradient reaches {ending}"))
    }

    /// Merges, gives the merged weight, and takes the merge back.
    ///
    /// # Errors
    /// If the change is no weight.
    pub fn merged(&mut self) -> Result<(Tensor, Tensor)> {
        let merged = self.set.merge(&mut self.host, self.weight.dtype())?;
        let inside = self.host.0.base().dequantize(self.weight.dtype())?;
        self.set.unmerge(&mut self.host, merged)?;
        self.set.activate(&mut self.host, &[("a", 1.0)])?;
        Ok((inside, self.host.0.base().dequantize(self.weight.dtype())?))
    }

    /// Trains towards `W + target` on white inputs, where the loss is |dW - target|^2 / |target|^2; gives the last one.
    ///
    /// # Errors
    /// If a step fails.
    pub fn fit(&self, target: &Tensor, lr: f64, steps: usize) -> Result<f64> {
        let variables: Vec<_> =
            self.parameters.trainable().map(|p| Ok((p.name.clone(), p.var()?))).collect::<Result<_>>()?;
        let tensors: Vec<Tensor> = self.parameters.trainable().map(|p| p.tensor.clone()).collect();
        let recipe = Recipe { weight_decay: 0.0, ..Recipe::default() };
        let mut optimizer = Optimizer::new(&recipe, variables, vec![1.0; tensors.len()])?;
        let eye = Tensor::eye(self.weight.dim(1)?, self.weight.dtype(), &Device::Cpu)?;
        let wanted = (&self.weight + target)?.t()?.contiguous()?;
        let size = norm(target)?.powi(2);
        let loss = || -> Result<Tensor> { Ok(((self.forward(&eye)? - &wanted)?.sqr()?.sum_all()? / size)?) };
        for step in 0..steps {
            let grads = loss()?.backward()?;
            let gradients: Vec<Option<Tensor>> = tensors.iter().map(|t| grads.get(t).cloned()).collect();
            // To zero over the last half, so that the noise of large steps does not decide.
            let left = (2.0 * (steps - step) as f64 / steps as f64).min(1.0);
            optimizer.step(&gradients, Step { lr: lr * left, scale: 1.0, holds: &NO_HOLDS })?;
        }
        Ok(loss()?.to_dtype(DType::F64)?.to_scalar::<f64>()?)
    }
}

/// The least loss of [`Map::fit`] over learning rates, each from the start, for the settings of a method.
///
/// # Errors
/// As [`Map::fit`].
pub fn best_fit(
    weight: &Tensor,
    settings: &str,
    seed: u64,
    evidence: Option<&Tensor>,
    target: &Tensor,
    steps: usize,
) -> Result<f64> {
    let mut best = f64::INFINITY;
    for lr in [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1] {
        let loss = Map::new(weight, method(settings)?, seed, evidence)?.fit(target, lr, steps)?;
        best = if loss < best { loss } else { best };
    }
    Ok(best)
}

/// A matrix [m, n] with the given singular values and random singular vectors.
///
/// # Errors
/// If the decomposition fails.
pub fn with_spectrum(seed: u64, (m, n): (usize, usize), value: impl Fn(usize) -> f64) -> Result<Tensor> {
    let (u, s, vt) = espalier_adapters::decomposition::svd(&draw(seed, "spectrum", 1.0, (m, n))?)?;
    let values: Vec<f32> = (0..s.len()).map(|i| value(i) as f32).collect();
    Ok(u.broadcast_mul(&Tensor::new(values, &Device::Cpu)?)?.matmul(&vt)?)
}
