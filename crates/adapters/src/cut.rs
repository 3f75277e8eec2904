//! An adapter cut to a rank: the first components of nested products, as an adapter that is saved and read like any other.

use std::collections::BTreeSet;

use crate::attach::Attached;
use crate::parameter::ParameterMap;
use crate::{AdapterConfig, Error, Result};

impl Attached {
    /// The settings and parameters of the first `rank` components of every product; sites of a lower rank stay whole.
    ///
    /// # Errors
    /// If the rank is 0 or above all products', or the method's products are not nested.
    pub fn cut(&self, rank: usize) -> Result<(AdapterConfig, ParameterMap)> {
        let name = self.config.method.name();
        let Some(method) = self.config.method.cut(rank) else {
            return Err(Error::unsupported(
                format!("cutting an adapter of `{name}` to rank {rank}"),
                "its first components do not work by themselves; train the method dylora",
            ));
        };
        let most = self.placement.sites.iter().map(|s| s.rank).max().unwrap_or(0);
        if rank == 0 || rank > most {
            return Err(Error::config("rank", format!("{rank} is not from 1 to the adapter's {most}")));
        }
        let mut config = AdapterConfig { method, ..self.config.clone() };
        config.targets.rank_pattern.values_mut().for_each(|r| *r = (*r).min(rank));
        let mut map = ParameterMap::new();
        let mut changed = BTreeSet::new();
        for (path, layer) in &self.layers {
            if let Some(cut) = layer.cut(rank)? {
                map.extend_under(path, cut.parameters);
                changed.insert(path.as_str());
            }
        }
        for p in self.parameters.iter() {
            if !changed.iter().any(|path| p.name.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'))) {
                map.push_as(p.name.clone(), &p.tensor, p.trainable, p.role);
            }
        }
        Ok((config, map))
    }
}
