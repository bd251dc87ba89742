//! Everything a step reads and writes: parameters and moments. With the step number it is all that a
//! checkpoint holds; the data cursor and every random key follow from the step.

use api::Step;
use checkpoint::{Restore, TensorTarget};

use crate::error::TrainError;
use crate::optimizer::OptimizerState;
use crate::parameters::Table;

/// The state of a job after `step` steps; replicated on every data-parallel rank.
#[derive(Debug)]
pub struct TrainState {
    /// Steps applied.
    pub step: Step,
    /// Parameters, flat.
    pub values: Vec<f32>,
    /// Moments, flat.
    pub optimizer: OptimizerState,
}

/// One named tensor of the state.
pub struct StateTensor<'a> {
    /// `model.…`, `optimizer.m.…` or `optimizer.v.…`.
    pub name: String,
    /// The parameter's shape.
    pub shape: &'a [usize],
    /// Its elements.
    pub data: &'a [f32],
}

impl TrainState {
    /// All tensors, in an order that depends on the model only.
    pub fn tensors<'a>(&'a self, table: &'a Table) -> Vec<StateTensor<'a>> {
        let groups = [
            ("model", &self.values),
            ("optimizer.m", &self.optimizer.m),
            ("optimizer.v", &self.optimizer.v),
        ];
        let mut tensors = Vec::with_capacity(3 * table.entries.len());
        for (prefix, buffer) in groups {
            if buffer.is_empty() {
                continue;
            }
            tensors.extend(table.entries.iter().map(|entry| StateTensor {
                name: format!("{prefix}.{}", entry.spec.name),
                shape: &entry.spec.shape,
                data: &buffer[entry.range.clone()],
            }));
        }
        tensors
    }

    /// The parameters alone, under their own names: the model file.
    pub fn model_tensors<'a>(&'a self, table: &'a Table) -> Vec<checkpoint::TensorSlice<'a>> {
        table
            .entries
            .iter()
            .map(|entry| checkpoint::TensorSlice {
                name: &entry.spec.name,
                shape: &entry.spec.shape,
                data: &self.values[entry.range.clone()],
            })
            .collect()
    }

    /// Replaces the state by a checkpoint's; every checksum is checked on the way.
    pub fn restore(&mut self, table: &Table, restore: &mut Restore) -> Result<(), TrainError> {
        let step = restore.manifest().step;
        let groups = [
            ("model", &mut self.values),
            ("optimizer.m", &mut self.optimizer.m),
            ("optimizer.v", &mut self.optimizer.v),
        ];
        let mut names = Vec::new();
        let mut outs = Vec::new();
        for (prefix, buffer) in groups {
            if buffer.is_empty() {
                continue;
            }
            let mut rest: &mut [f32] = buffer;
            for entry in &table.entries {
                let (out, tail) = rest.split_at_mut(entry.range.len());
                rest = tail;
                names.push(format!("{prefix}.{}", entry.spec.name));
                outs.push((entry.spec.shape.as_slice(), out));
            }
        }
        let mut targets: Vec<TensorTarget<'_>> = names
            .iter()
            .zip(outs)
            .map(|(name, (shape, out))| TensorTarget { name, shape, out })
            .collect();
        restore.read_all(&mut targets).map_err(|error| TrainError::restore(step, error))?;
        self.step = step;
        Ok(())
    }
}
