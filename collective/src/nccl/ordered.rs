//! Sums in a fixed order: grouped sends and receives of partials, then a local sum in tree order.
//!
//! The result has the same bits on every rank, for every number of ranks (by lanes), and the same
//! as over TCP, except for the payload of a NaN. Where there is no kernel (a maximum or minimum,
//! 16-bit floats, a driver that refused the kernels) the local part is computed on the host, by the
//! very code of the specification; the exchange is the same.

use crate::combine::Plan;
use crate::communicator::ReduceOp;
use crate::element::{Element, with_element};
use crate::error::CollectiveError;
use crate::lane_tree::{LaneTree, Subtree};
use crate::nccl::batch::{Pending, Step};
use crate::nccl::group::NcclGroup;
use crate::nccl::kernel::has_kernel;
use crate::nccl::memory::{DeviceBuffer, PinnedMemory};
use crate::nccl::tree::Layout;

/// The sum of one maximal subtree of lanes that a rank owns, on the GPU.
#[derive(Clone, Debug)]
pub struct DevicePartial {
    /// Which lanes.
    pub subtree: Subtree,
    /// Their sum, as long as the result.
    pub data: DeviceBuffer,
}

/// Copies from and to host memory around a sum, so that all of it is one batch.
#[derive(Debug, Default)]
pub(super) struct Staged {
    pub before: Vec<Step>,
    pub after: Vec<Step>,
    pub stage: Option<PinnedMemory>,
}

/// A sum to be made.
pub(super) struct Request<'a> {
    pub name: &'static str,
    pub tree: LaneTree,
    pub partials: &'a [DevicePartial],
    /// The whole result, or this rank's chunk of it.
    pub output: &'a DeviceBuffer,
    pub op: ReduceOp,
    /// Leave each rank its chunk only.
    pub scatter: bool,
}

impl NcclGroup {
    /// [`Self::all_reduce`] in the fixed order of the ranks' tree.
    ///
    /// # Errors
    /// As for [`Self::all_reduce`].
    pub fn all_reduce_ordered(
        &mut self,
        input: &DeviceBuffer,
        output: &DeviceBuffer,
        op: ReduceOp,
    ) -> Result<Pending, CollectiveError> {
        self.over_ranks("all_reduce_ordered", input, (output, false), op)
    }

    /// Reduces in the fixed order of the ranks' tree; each rank gets its [`crate::chunk_range`].
    ///
    /// # Errors
    /// As for [`Self::all_reduce`].
    pub fn reduce_scatter_ordered(
        &mut self,
        input: &DeviceBuffer,
        output: &DeviceBuffer,
        op: ReduceOp,
    ) -> Result<Pending, CollectiveError> {
        self.over_ranks("reduce_scatter_ordered", input, (output, true), op)
    }

    /// Sums over lanes as [`crate::Communicator::reduce_lanes`] does.
    ///
    /// # Errors
    /// As for [`Self::all_reduce`].
    pub fn reduce_lanes(
        &mut self,
        tree: &LaneTree,
        partials: &[DevicePartial],
        output: &DeviceBuffer,
    ) -> Result<Pending, CollectiveError> {
        let (name, tree, op) = ("reduce_lanes", tree.clone(), ReduceOp::Sum);
        let request = Request { name, tree, partials, output, op, scatter: false };
        self.ordered(request, Staged::default())
    }

    /// One partial per rank; `output` and whether it is this rank's chunk only.
    fn over_ranks(
        &mut self,
        name: &'static str,
        input: &DeviceBuffer,
        (output, scatter): (&DeviceBuffer, bool),
        op: ReduceOp,
    ) -> Result<Pending, CollectiveError> {
        let partials = &[self.own_partial(input)];
        let tree = LaneTree::new(self.world);
        self.ordered(Request { name, tree, partials, output, op, scatter }, Staged::default())
    }

    pub(super) fn own_partial(&self, data: &DeviceBuffer) -> DevicePartial {
        let subtree = Subtree { start: self.rank, len: 1 };
        DevicePartial { subtree, data: data.clone() }
    }

    pub(super) fn ordered(
        &mut self,
        request: Request<'_>,
        staged: Staged,
    ) -> Result<Pending, CollectiveError> {
        let layout = self.layout(&request)?;
        let (element, own) = (request.output.element(), layout.own());
        let slots = self.scratch(element, layout.slots() * own.len())?;
        let slot = |number: usize| slots.slice(number * own.len()..(number + 1) * own.len());
        let target = if layout.direct || request.scatter {
            request.output.clone()
        } else {
            request.output.slice(own.clone())?
        };
        let exchange = self.exchange(&layout, request.partials, &slot)?;
        let gather = self.gather_steps(&layout, &request, &target)?;
        if self.kernels && has_kernel(element, request.op) {
            let mut steps = staged.before;
            steps.extend(exchange);
            for (index, add) in layout.adds.iter().enumerate() {
                let (left, right) = (slot(add.left)?, slot(add.right)?);
                let last = index + 1 == layout.adds.len();
                let into = if last { target.clone() } else { left.clone() };
                steps.push(Step::Sum { into, left, right });
            }
            if layout.adds.is_empty() {
                steps.push(Step::Copy { from: slot(0)?, to: target.clone() });
            }
            if request.op == ReduceOp::Avg {
                steps.push(Step::Divide { buffer: target, by: self.world });
            }
            steps.extend(gather);
            steps.extend(staged.after);
            return self.submit(request.name, steps, staged.stage);
        }
        let stage = self.submit(request.name, staged.before, staged.stage)?.wait_stage()?;
        self.combine_on_host(&layout, &request, exchange, &slots, &target, gather)?;
        self.submit(request.name, staged.after, stage)
    }

    /// Every rank's partials of this rank's range, into the slots.
    fn exchange(
        &self,
        layout: &Layout,
        partials: &[DevicePartial],
        slot: &dyn Fn(usize) -> Result<DeviceBuffer, CollectiveError>,
    ) -> Result<Vec<Step>, CollectiveError> {
        let (mut calls, mut steps) = (self.calls(), Vec::new());
        for (number, partial) in layout.slots_of(self.rank).zip(partials) {
            steps.push(Step::Copy { from: partial.data.slice(layout.own())?, to: slot(number)? });
        }
        for peer in (0..self.world).filter(|peer| *peer != self.rank) {
            for partial in partials {
                calls.push_send(partial.data.slice(layout.range_of(peer))?, peer as i32);
            }
            for number in layout.slots_of(peer) {
                calls.push_recv(slot(number)?, peer as i32);
            }
        }
        steps.push(Step::Nccl(calls.into_calls()));
        Ok(steps)
    }

    /// Every rank's range of the result, on every rank.
    fn gather_steps(
        &self,
        layout: &Layout,
        request: &Request<'_>,
        target: &DeviceBuffer,
    ) -> Result<Vec<Step>, CollectiveError> {
        if layout.direct || request.scatter {
            return Ok(Vec::new());
        }
        let (mut calls, lens) = (self.calls(), layout.lens());
        if lens.iter().all(|len| *len == lens[0]) {
            calls.all_gather(target, request.output)?;
        } else {
            calls.all_gather_v(target, request.output, &lens)?;
        }
        Ok(vec![Step::Nccl(calls.into_calls())])
    }

    fn combine_on_host(
        &mut self,
        layout: &Layout,
        request: &Request<'_>,
        exchange: Vec<Step>,
        slots: &DeviceBuffer,
        target: &DeviceBuffer,
        gather: Vec<Step>,
    ) -> Result<(), CollectiveError> {
        let stage = PinnedMemory::new(&self.device, slots.bytes())?;
        let mut steps = exchange;
        steps.push(Step::ToHost { from: slots.clone(), offset: 0 });
        let stage = self.submit(request.name, steps, Some(stage))?.wait_stage()?;
        let Some(mut stage) = stage else { return invalid(request.name, "it lost its stage") };
        let bytes = &mut stage.as_mut_slice()[..slots.bytes()];
        let result =
            with_element!(request.output, T => fold::<T>(bytes, layout, request, self.world));
        let Some(result) = result else {
            let element = request.output.element();
            return invalid(request.name, format!("no sum of {element} on the host"));
        };
        bytes[..result.len()].copy_from_slice(&result);
        let mut steps = vec![Step::ToDevice { offset: 0, to: target.clone() }];
        steps.extend(gather);
        self.submit(request.name, steps, Some(stage))?.wait()
    }

    fn layout(&self, request: &Request<'_>) -> Result<Layout, CollectiveError> {
        let Request { name, tree, partials, output, op, scatter } = request;
        let element = output.element();
        let own_nodes = || tree.owned_subtrees(tree.lanes_of(self.rank, self.world));
        if *op == ReduceOp::Avg && !element.is_float() {
            return invalid(name, format!("an average of {element} would round"));
        }
        let len =
            if *scatter { partials.first().map_or(0, |p| p.data.len()) } else { output.len() };
        let shape = (self.rank, self.world);
        let Some(layout) = Layout::new(tree, shape, (len, element.bytes()), *scatter) else {
            let (world, lanes) = (self.world, tree.lanes());
            return invalid(name, format!("{world} ranks share {lanes} lanes"));
        };
        if !partials.iter().map(|partial| partial.subtree).eq(own_nodes()) {
            let found: Vec<Subtree> = partials.iter().map(|partial| partial.subtree).collect();
            return invalid(name, format!("partials {found:?}, expected {:?}", own_nodes()));
        }
        for DevicePartial { data, .. } in *partials {
            if data.element() != element || data.len() != len {
                return invalid(name, format!("the partial {data:?} beside {output:?}"));
            }
        }
        if *scatter && output.len() != layout.own().len() {
            let expected = layout.own().len();
            return invalid(name, format!("{output:?}, expected a chunk of {expected}"));
        }
        Ok(layout)
    }
}

/// The local sum by the code of the specification.
fn fold<T: Element>(
    bytes: &[u8],
    layout: &Layout,
    request: &Request<'_>,
    world: u32,
) -> Option<Vec<u8>> {
    let len = layout.own().len();
    let mut values = vec![T::zeroed(); layout.slots() * len];
    bytemuck::cast_slice_mut(&mut values).copy_from_slice(bytes);
    let parts: Vec<&[T]> =
        (0..layout.slots()).map(|slot| &values[slot * len..(slot + 1) * len]).collect();
    let mut output = vec![T::zeroed(); len];
    let plan = Plan::new(&request.tree, &layout.nodes.concat())?;
    plan.run(&parts, &mut output, request.op, world);
    Some(bytemuck::cast_slice(&output).to_vec())
}

fn invalid<R>(call: &str, message: impl Into<String>) -> Result<R, CollectiveError> {
    Err(CollectiveError::InvalidDeviceCall { call: call.to_owned(), message: message.into() })
}
