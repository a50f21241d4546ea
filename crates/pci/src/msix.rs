use outboard_bus::{AccessError, MsiMessage, MsiSink, Width};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// Where the MSI-X structures stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// BAR index of both.
    pub bar: u8,
    /// Offset of the table in the BAR: a multiple of 8; 16 bytes for each vector.
    pub table: u32,
    /// Offset of the pending bit array: a multiple of 8; 8 bytes for each 64 vectors.
    pub pba: u32,
}

/// Carries vectors past this process: something signals the interrupt's source into the guest by itself while it may be sent, and keeps it
/// while it may not. Called under the vector's lock, from any thread; never blocks for long and never calls back.
pub trait VectorRoutes: Send + Sync {
    /// From now on `vector`'s source sends `message`; what came since [`VectorRoutes::take`] is sent too.
    fn connect(&self, vector: u16, message: MsiMessage);

    /// When this returns, `vector`'s source sends nothing more by itself; what comes is kept.
    fn disconnect(&self, vector: u16);

    /// Takes back what came while `vector` was not connected: `true` if anything did.
    fn take(&self, vector: u16) -> bool;
}

/// One vector: its table entry (PCIe 7.7.2.5 to 7.7.2.8) and its pending bit.
#[derive(Clone, Copy, Debug)]
struct Vector {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
    /// What its route sends now, if it is connected.
    routed: Option<MsiMessage>,
}

/// Vectors are masked after reset (PCIe 7.7.2.8).
const AFTER_RESET: Vector = Vector { address: 0, data: 0, masked: true, pending: false, routed: None };

/// MSI-X of one function: table, pending bits, masking, delivery.
///
/// Every trigger gives exactly one message, at once or when the last mask goes; triggers of a masked vector merge. With
/// [`VectorRoutes`] a vector that may send is connected to its route, and one that may not is asked for what it kept.
///
/// Lock order: one lock for each vector, and the sink (which never blocks) is called under it, so that a message cannot
/// overtake the mask that the guest has seen take effect. `enabled` and `held` are stored before the vectors
/// are looked at, and read under the vector's lock: one of the two sides always sees the other.
pub struct Msix {
    vectors: Vec<Mutex<Vector>>,
    enabled: AtomicBool,
    held: AtomicBool,
    sink: Arc<dyn MsiSink>,
    routes: Option<Arc<dyn VectorRoutes>>,
}

impl std::fmt::Debug for Msix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Msix").field("vectors", &self.vectors).finish_non_exhaustive()
    }
}

impl Msix {
    /// `vectors` (1 to 2048, PCIe 7.7.2.2) vectors that send through `sink`.
    ///
    /// # Panics
    /// If `vectors` is out of range.
    pub fn new(vectors: u16, sink: Arc<dyn MsiSink>) -> Self {
        Self::with_routes(vectors, sink, None)
    }

    /// As [`Msix::new`]; what `routes` carries does not pass through [`Msix::trigger`].
    ///
    /// # Panics
    /// As [`Msix::new`].
    pub fn with_routes(vectors: u16, sink: Arc<dyn MsiSink>, routes: Option<Arc<dyn VectorRoutes>>) -> Self {
        assert!((1..=2048).contains(&vectors), "{vectors} MSI-X vectors");
        Self {
            vectors: (0..vectors).map(|_| Mutex::new(AFTER_RESET)).collect(),
            enabled: AtomicBool::new(false),
            held: AtomicBool::new(false),
            sink,
            routes,
        }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Bytes of the table.
    pub fn table_len(&self) -> u64 {
        16 * self.vectors.len() as u64
    }

    /// Bytes of the pending bit array.
    pub fn pba_len(&self) -> u64 {
        8 * self.vectors.len().div_ceil(64) as u64
    }

    /// Sends vector `vector`'s message, now or when it is unmasked. Nothing happens if there is no such vector or if
    /// MSI-X is off. From any thread.
    pub fn trigger(&self, vector: u16) {
        let Some(cell) = self.vectors.get(usize::from(vector)) else { return };
        let mut state = lock(cell);
        if self.enabled.load(Ordering::SeqCst) {
            state.pending = true;
            self.settle(vector, &mut state);
        }
    }

    /// Sets what vector `vector` sends and whether it is masked by itself: for MSI, whose registers are elsewhere.
    /// Nothing happens if there is no such vector.
    pub fn set_vector(&self, vector: u16, message: MsiMessage, masked: bool) {
        let Some(cell) = self.vectors.get(usize::from(vector)) else { return };
        let mut state = lock(cell);
        (state.address, state.data, state.masked) = (message.address, message.data, masked);
        self.settle(vector, &mut state);
    }

    /// Whether vector `vector` waits to be sent.
    pub fn is_pending(&self, vector: u16) -> bool {
        self.vectors.get(usize::from(vector)).is_some_and(|cell| self.collect(vector, &mut lock(cell)))
    }

    /// The guest changed MSI-X enable, or what holds all vectors back: the function mask or bus master off.
    /// Whatever is pending is forgotten when MSI-X goes off.
    pub fn set_control(&self, enabled: bool, held: bool) {
        let was_enabled = self.enabled.swap(enabled, Ordering::SeqCst);
        let was_held = self.held.swap(held, Ordering::SeqCst);
        if (was_enabled, was_held) == (enabled, held) {
            return;
        }
        for (index, vector) in (0..).zip(&self.vectors) {
            let mut vector = lock(vector);
            self.settle(index, &mut vector);
            if !enabled {
                self.collect(index, &mut vector);
                vector.pending = false;
            }
        }
    }

    /// Makes route and pending bit follow what the vector may do now.
    fn settle(&self, index: u16, vector: &mut Vector) {
        let open = self.enabled.load(Ordering::SeqCst) && !self.held.load(Ordering::SeqCst) && !vector.masked;
        let target = open.then_some(MsiMessage { address: vector.address, data: vector.data });
        if let Some(routes) = self.routes.as_ref().filter(|_| vector.routed != target) {
            if vector.routed.take().is_some() {
                routes.disconnect(index);
            }
            if let Some(message) = target {
                // What was kept goes out once below; what comes from here on is the route's.
                vector.pending |= routes.take(index);
                routes.connect(index, message);
            }
            vector.routed = target;
        }
        if let Some(message) = target.filter(|_| vector.pending) {
            vector.pending = false;
            self.sink.send(message);
        }
    }

    /// Whether the vector is pending, with what its route kept.
    fn collect(&self, index: u16, vector: &mut Vector) -> bool {
        if let Some(routes) = self.routes.as_ref().filter(|_| vector.routed.is_none()) {
            vector.pending |= routes.take(index);
        }
        vector.pending
    }

    /// A guest load from the table; 4 or 8 bytes, aligned (PCIe 7.7.2: other accesses are undefined).
    ///
    /// # Errors
    /// [`AccessError::BadWidth`], [`AccessError::NoRegister`] beyond the last vector.
    pub fn table_read(&self, offset: u64, width: Width) -> Result<u64, AccessError> {
        let vector = *lock(self.entry(offset, width)?.1);
        let control = u64::from(vector.masked) << 32;
        Ok(match (offset % 16, width) {
            (0, Width::B8) => vector.address,
            (0, _) => vector.address & 0xffff_ffff,
            (4, _) => vector.address >> 32,
            (8, Width::B8) => control | u64::from(vector.data),
            (8, _) => u64::from(vector.data),
            (_, _) => control >> 32,
        })
    }

    /// A guest store to the table; 4 or 8 bytes, aligned.
    ///
    /// # Errors
    /// As [`Msix::table_read`].
    pub fn table_write(&self, offset: u64, width: Width, value: u64) -> Result<(), AccessError> {
        let (index, cell) = self.entry(offset, width)?;
        let mut vector = lock(cell);
        let low = value & 0xffff_ffff;
        match (offset % 16, width) {
            (0, Width::B8) => vector.address = value,
            (0, _) => vector.address = vector.address & !0xffff_ffff | low,
            (4, _) => vector.address = low << 32 | vector.address & 0xffff_ffff,
            (8, Width::B8) => {
                vector.data = low as u32;
                vector.masked = value >> 32 & 1 != 0;
            }
            (8, _) => vector.data = low as u32,
            (_, _) => vector.masked = low & 1 != 0,
        }
        // Address bits 1:0 are always zero (PCIe 7.7.2.5).
        vector.address &= !3;
        self.settle(index, &mut vector);
        Ok(())
    }

    fn entry(&self, offset: u64, width: Width) -> Result<(u16, &Mutex<Vector>), AccessError> {
        if !matches!(width, Width::B4 | Width::B8) || !offset.is_multiple_of(width.bytes()) {
            return Err(AccessError::BadWidth);
        }
        let index = u16::try_from(offset / 16).map_err(|_| AccessError::NoRegister)?;
        self.vectors.get(usize::from(index)).map(|cell| (index, cell)).ok_or(AccessError::NoRegister)
    }

    /// A guest load from the pending bit array. Stores to it do nothing (PCIe 7.7.2.9).
    ///
    /// # Errors
    /// As [`Msix::table_read`].
    pub fn pba_read(&self, offset: u64, width: Width) -> Result<u64, AccessError> {
        if !matches!(width, Width::B4 | Width::B8) || !offset.is_multiple_of(width.bytes()) {
            return Err(AccessError::BadWidth);
        }
        if offset >= self.pba_len() {
            return Err(AccessError::NoRegister);
        }
        let first = 8 * offset as u16;
        Ok((0..8 * width.bytes() as u16).fold(0, |bits, i| bits | u64::from(self.is_pending(first + i)) << i))
    }

    /// Off, every vector masked and nothing pending.
    pub fn reset(&self) {
        self.enabled.store(false, Ordering::SeqCst);
        self.held.store(false, Ordering::SeqCst);
        for (index, vector) in (0..).zip(&self.vectors) {
            let mut vector = lock(vector);
            vector.masked = true;
            self.settle(index, &mut vector);
            self.collect(index, &mut vector);
            *vector = AFTER_RESET;
        }
    }
}

fn lock(vector: &Mutex<Vector>) -> MutexGuard<'_, Vector> {
    // A vector is whole between any two of its assignments, so a panicked holder left nothing half done.
    vector.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests;
