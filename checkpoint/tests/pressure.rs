//! A store that is slower than checkpoints come: memory stays at two copies, and who stages waits and
//! is told for how long.

mod support;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use api::Step;
use api::job::Compression;
use async_trait::async_trait;
use checkpoint::{SaveError, Saver, Store};
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use support::{State, options};
use tokio::sync::Semaphore;

/// Writes only as often as it is let.
#[derive(Debug)]
struct Gate {
    inner: InMemory,
    permits: Arc<Semaphore>,
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a store behind a gate")
    }
}

#[async_trait]
impl ObjectStore for Gate {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let permit = self.permits.acquire().await.expect("never closed");
        permit.forget();
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[test]
fn whoever_stages_faster_than_the_store_writes_waits_with_two_copies_in_memory() {
    let permits = Arc::new(Semaphore::new(0));
    let gate = Gate { inner: InMemory::new(), permits: permits.clone() };
    let store = Store::with_inner(Arc::new(gate), "a store behind a gate");
    let mut saver = Saver::with_store(store, options(0, 1, Compression::None)).expect("starts");
    let state = State::new(3, 4000);
    // Nothing is written yet: two are staged at once, each into an arena of its own.
    for step in 1..=2 {
        let waited = saver.stage(Step(step), &state.slices()).expect("stages");
        assert!(waited < Duration::from_secs(5), "step {step} waited {waited:?} for a free arena");
    }
    assert_eq!(saver.poll_shards().expect("no error"), []);
    // The third can end only after the gate has let one through: it is opened by nobody else.
    let opened = std::thread::spawn({
        let permits = permits.clone();
        move || permits.add_permits(1)
    });
    saver.stage(Step(3), &state.slices()).expect("stages");
    opened.join().expect("opened");
    let written = saver.poll_shards().expect("no error");
    assert_eq!(written.len(), 1, "a third arena was filled before one came back");
    permits.add_permits(2);
    assert!(saver.wait_shard(Step(3)).is_ok());
    saver.finish().expect("finishes");
}

#[test]
fn a_wait_for_a_store_that_takes_nothing_is_given_up_when_asked() {
    let permits = Arc::new(Semaphore::new(0));
    let gate = Gate { inner: InMemory::new(), permits: permits.clone() };
    let store = Store::with_inner(Arc::new(gate), "a store behind a gate");
    let mut saver = Saver::with_store(store, options(0, 1, Compression::None)).expect("starts");
    let is_wanted = Arc::new(AtomicBool::new(true));
    let asked = is_wanted.clone();
    saver.abandon_when(move |_| asked.load(Ordering::Relaxed));
    let state = State::new(3, 4000);
    saver.stage(Step(1), &state.slices()).expect("stages");
    assert_eq!(saver.wait_shard(Step(1)), Err(SaveError::Abandoned));
    // What was under way was not touched.
    is_wanted.store(false, Ordering::Relaxed);
    permits.add_permits(1);
    assert!(saver.wait_shard(Step(1)).is_ok());
    saver.finish().expect("finishes");
}
