//! Named parameters, trainable or frozen, in the on-disk naming of their method.

use candle_core::{Tensor, Var};

use crate::Result;

/// What a parameter is in its method, for optimisers that treat the sides of a low-rank product differently.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Role {
    /// The side that reads the input (A).
    Down,
    /// The side that writes the output (B).
    Up,
    /// Factors between the two, one for every rank.
    Gate,
    /// Anything else.
    #[default]
    Other,
}

/// One tensor of an adapter or of a densely trained module.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Full name: module path, then the method's own name (`model.layers.0.self_attn.q_proj.lora_A.weight`).
    pub name: String,
    /// The values; the tensor of a [`Var`] where it is trainable.
    pub tensor: Tensor,
    /// Whether the optimiser moves it. Frozen ones (random bases) are saved but not stepped.
    pub trainable: bool,
    /// What it is in its method.
    pub role: Role,
}

impl Parameter {
    /// The variable behind a trainable parameter.
    ///
    /// # Errors
    /// If the tensor could not be made a variable.
    pub fn var(&self) -> Result<Var> {
        Ok(Var::from_tensor(&self.tensor)?)
    }
}

/// Parameters in a fixed order (the order of the model's modules, then of the method).
#[derive(Debug, Clone, Default)]
pub struct ParameterMap(Vec<Parameter>);

impl ParameterMap {
    /// An empty map.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one parameter.
    pub fn push(&mut self, name: impl Into<String>, tensor: &Tensor, trainable: bool) {
        self.push_as(name, tensor, trainable, Role::Other);
    }

    /// Adds one parameter with its role.
    pub fn push_as(&mut self, name: impl Into<String>, tensor: &Tensor, trainable: bool, role: Role) {
        self.0.push(Parameter { name: name.into(), tensor: tensor.clone(), trainable, role });
    }

    /// Adds all of `other`, each name under `prefix.`.
    pub fn extend_under(&mut self, prefix: &str, other: ParameterMap) {
        self.0.extend(other.0.into_iter().map(|p| Parameter { name: format!("{prefix}.{}", p.name), ..p }));
    }

    /// Adds all of `other` under their own names.
    pub fn extend(&mut self, other: ParameterMap) {
        self.0.extend(other.0);
    }

    /// All parameters in order.
    pub fn iter(&self) -> impl Iterator<Item = &Parameter> {
        self.0.iter()
    }

    /// The parameters that the optimiser moves, in order.
    pub fn trainable(&self) -> impl Iterator<Item = &Parameter> {
        self.0.iter().filter(|p| p.trainable)
    }

    /// Takes those that `keep` does not want out of what is trained; they stay parameters, and are saved.
    pub fn train_only(&mut self, keep: impl Fn(&Parameter) -> bool) {
        for parameter in &mut self.0 {
            parameter.trainable &= keep(parameter);
        }
    }

    /// The parameter of that name.
    pub fn get(&self, name: &str) -> Option<&Parameter> {
        self.0.iter().find(|p| p.name == name)
    }

    /// How many tensors.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of trainable values.
    pub fn trainable_count(&self) -> usize {
        self.trainable().map(|p| p.tensor.elem_count()).sum()
    }
}
