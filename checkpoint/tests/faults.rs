//! Stores that fail on purpose: every single call of a save fails once, before or after having
//! taken effect, or the store goes away at that call; and stores that break their promise.

mod support;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use api::job::Compression;
use async_trait::async_trait;
use bytes::Bytes;
use checkpoint::{Store, StoreError, keys};
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
    Result, UploadPart,
};
use support::{State, job, restore, runtime, save};

/// What happens at the chosen call.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// It fails, having done nothing.
    Before,
    /// It is done, and its answer is lost.
    After,
    /// It and every later call fail: the store, or we, are gone.
    Gone,
    /// `PutMode::Create` overwrites.
    CreateOverwrites,
    /// `PutMode::Create` looks first and writes later, as if the two were one.
    CreateLooksFirst,
    /// `PutMode::Create` is not known.
    CreateUnsupported,
}

#[derive(Debug)]
struct Faulty {
    inner: Arc<InMemory>,
    fault: Fault,
    at: usize,
    calls: Arc<AtomicUsize>,
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a store that fails")
    }
}

fn lost() -> Error {
    let source = std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer came");
    Error::Generic { store: "faulty", source: Box::new(source) }
}

/// Decides what becomes of a call: whether it runs, and whether its answer arrives.
fn meet(calls: &AtomicUsize, at: usize, fault: Fault) -> (bool, bool) {
    let call = calls.fetch_add(1, Ordering::SeqCst);
    match fault {
        Fault::Before if call == at => (false, false),
        Fault::After if call == at => (true, false),
        Fault::Gone if call >= at => (false, false),
        _ => (true, true),
    }
}

impl Faulty {
    fn store(inner: &Arc<InMemory>, fault: Fault, at: usize) -> (Store, Arc<AtomicUsize>) {
        let calls = Arc::new(AtomicUsize::new(0));
        let faulty = Self { inner: inner.clone(), fault, at, calls: calls.clone() };
        (Store::with_inner(Arc::new(faulty), "the faulty store"), calls)
    }

    async fn call<T>(&self, run: impl Future<Output = Result<T>>) -> Result<T> {
        let (runs, answers) = meet(&self.calls, self.at, self.fault);
        if !runs {
            return Err(lost());
        }
        let result = run.await;
        if answers { result } else { Err(lost()) }
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        mut options: PutOptions,
    ) -> Result<PutResult> {
        if options.mode == PutMode::Create {
            match self.fault {
                Fault::CreateOverwrites => options.mode = PutMode::Overwrite,
                Fault::CreateLooksFirst => {
                    let exists = self.inner.head(location).await.is_ok();
                    tokio::task::yield_now().await;
                    if !exists {
                        options.mode = PutMode::Overwrite;
                    }
                }
                Fault::CreateUnsupported => {
                    let (operation, implementer) = ("create".into(), "faulty".into());
                    return Err(Error::NotImplemented { operation, implementer });
                }
                _ => {}
            }
        }
        self.call(self.inner.put_opts(location, payload, options)).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let inner = self.call(self.inner.put_multipart_opts(location, options)).await?;
        let (at, fault, calls) = (self.at, self.fault, self.calls.clone());
        Ok(Box::new(FaultyUpload { inner, fault, at, calls }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.call(self.inner.get_opts(location, options)).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.call(self.inner.get_ranges(location, ranges)).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let (inner, at, fault) = (self.inner.clone(), self.at, self.fault);
        let calls = self.calls.clone();
        let delete = move |location: Result<Path>| {
            let (inner, calls) = (inner.clone(), calls.clone());
            async move {
                let location = location?;
                let (runs, answers) = meet(&calls, at, fault);
                if runs {
                    inner.delete(&location).await?;
                }
                if answers { Ok(location) } else { Err(lost()) }
            }
        };
        locations.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match meet(&self.calls, self.at, self.fault) {
            (true, true) => self.inner.list(prefix),
            _ => futures::stream::once(async { Err(lost()) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.call(self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.call(self.inner.copy_opts(from, to, options)).await
    }
}

#[derive(Debug)]
struct FaultyUpload {
    inner: Box<dyn MultipartUpload>,
    fault: Fault,
    at: usize,
    calls: Arc<AtomicUsize>,
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (runs, answers) = meet(&self.calls, self.at, self.fault);
        if !runs {
            return Box::pin(async { Err(lost()) });
        }
        let part = self.inner.put_part(data);
        Box::pin(
            async move { part.await.and_then(|()| if answers { Ok(()) } else { Err(lost()) }) },
        )
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let (runs, answers) = meet(&self.calls, self.at, self.fault);
        if !runs {
            return Err(lost());
        }
        let result = self.inner.complete().await;
        if answers { result } else { Err(lost()) }
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

/// Saves once per call that a save makes, with that call failing, and looks at what is left.
fn fail_every_call(state: &State, world_size: u32, compression: Compression) {
    let runtime = runtime();
    for fault in [Fault::Before, Fault::After, Fault::Gone] {
        for at in 0.. {
            let inner = Arc::new(InMemory::new());
            let (faulty, calls) = Faulty::store(&inner, fault, at);
            let saved = save(&faulty, state, 1, world_size, compression);
            let place = format!("{fault:?} at call {at}: {saved:?}");

            let store = Store::with_inner(inner, "the store beneath");
            let key = keys::manifest(&job(), api::Step(1), api::Generation(3));
            let complete = runtime.block_on(checkpoint::find_complete(&store, &job(), None));
            let complete = complete.expect("lists");
            match runtime.block_on(checkpoint::verify(&store, &key, None)) {
                Ok(report) => {
                    assert!(report.ok, "{place}: torn: {report:?}");
                    assert_eq!(complete.len(), 1, "{place}");
                }
                Err(error) => {
                    assert!(error.is_not_found(), "{place}: {error}");
                    assert!(complete.is_empty(), "{place}");
                }
            }
            match &saved {
                Ok(fact) => {
                    assert_eq!(complete.first(), Some(fact), "{place}");
                    assert_eq!(restore(&store, fact, state).as_ref(), Ok(state), "{place}");
                }
                // One lost call is survived by trying again, whatever it was.
                Err(error) => {
                    assert_eq!(fault, Fault::Gone, "{place}");
                    assert!(error.is_retryable(), "{place}");
                }
            }
            if calls.load(Ordering::SeqCst) <= at {
                assert!(at >= 3 && saved.is_ok(), "{place}: no save makes so few calls");
                println!("{fault:?}: {at} calls of a save");
                break;
            }
        }
    }
}

#[test]
fn one_failing_call_of_a_restore_is_survived() {
    let state = State::new(8, 20_000);
    let inner = Arc::new(InMemory::new());
    let store = Store::with_inner(inner.clone(), "the store beneath");
    let fact = save(&store, &state, 1, 2, Compression::Zstd).expect("saves");
    for at in 0.. {
        let (faulty, calls) = Faulty::store(&inner, Fault::Before, at);
        assert_eq!(restore(&faulty, &fact, &state).as_ref(), Ok(&state), "call {at}");
        let (gone, _) = Faulty::store(&inner, Fault::Gone, at);
        let restored = restore(&gone, &fact, &state);
        if calls.load(Ordering::SeqCst) <= at {
            assert!(at >= 5 && restored.is_ok(), "no restore makes only {at} calls");
            break;
        }
        assert!(restored.expect_err("the store is gone").is_retryable());
    }
}

#[test]
fn no_failing_call_of_a_save_tears_a_checkpoint() {
    fail_every_call(&State::new(5, 20_000), 2, Compression::None);
}

#[test]
fn no_failing_call_of_a_save_in_parts_tears_a_checkpoint() {
    // 36 MB in three parts.
    fail_every_call(&State::new(6, 12_000_000), 1, Compression::None);
}

#[test]
fn compressed_shards_are_uploaded_in_parts_too() {
    let state = State::new(7, 60_000_000);
    let store = Store::with_inner(Arc::new(InMemory::new()), "memory");
    let fact = save(&store, &state, 1, 1, Compression::Zstd).expect("saves");
    assert!(fact.bytes > 40 << 20, "{} bytes are not three parts", fact.bytes);
    assert_eq!(restore(&store, &fact, &state).expect("restores"), state);
}

#[test]
fn a_store_that_lets_two_writers_win_is_refused() {
    for (fault, part) in [
        (Fault::CreateOverwrites, "12 of 12 writers"),
        (Fault::CreateLooksFirst, "writers that created one object at once"),
        (Fault::CreateUnsupported, "only if absent"),
    ] {
        let inner = Arc::new(InMemory::new());
        let (store, _) = Faulty::store(&inner, fault, usize::MAX);
        let error = runtime().block_on(store.probe()).expect_err("refused");
        assert!(matches!(error, StoreError::Unsafe { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
        assert!(!error.is_retryable());
        let left = runtime().block_on(store.list("probe"));
        assert_eq!(left, Ok(vec![]), "the probe left something");
    }
    let honest = Store::with_inner(Arc::new(InMemory::new()), "memory");
    runtime().block_on(honest.probe()).expect("accepted");
}

#[test]
fn a_deletion_that_breaks_off_leaves_no_manifest_without_its_shards() {
    let state = State::new(9, 4000);
    let mut broken_off = 0;
    for fault in [Fault::Before, Fault::After, Fault::Gone] {
        for at in 0.. {
            let inner = Arc::new(InMemory::new());
            let honest = Store::with_inner(inner.clone(), "the store beneath");
            let fact = save(&honest, &state, 1, 3, Compression::None).expect("saved");
            let (faulty, calls) = Faulty::store(&inner, fault, at);
            let deleted = runtime().block_on(checkpoint::delete_checkpoint(
                &faulty,
                &fact.manifest_key,
                &checkpoint::References::default(),
            ));
            let found = runtime().block_on(checkpoint::list_checkpoints(&honest, &job()));
            let found = found.expect("lists");
            let whole = runtime().block_on(checkpoint::find_complete(&honest, &job(), None));
            let whole = whole.expect("lists").len();
            let has_manifest = found.iter().filter(|found| found.is_complete).count();
            assert_eq!(has_manifest, whole, "{fault:?} at {at}: a manifest outlived a shard");
            broken_off += usize::from(found.len() > whole);
            // What is left shows, and can be deleted.
            assert!(deleted.is_err() || found.is_empty(), "{fault:?} at {at}: {found:?}");
            for found in found {
                let none = checkpoint::References::default();
                let deleted = checkpoint::delete_checkpoint(&honest, &found.manifest_key, &none);
                runtime().block_on(deleted).expect("deletes");
            }
            assert_eq!(runtime().block_on(honest.list("")), Ok(vec![]), "{fault:?} at {at}");
            if calls.load(Ordering::SeqCst) <= at {
                break;
            }
        }
    }
    assert!(broken_off > 0, "no deletion broke off between manifest and shards");
}
