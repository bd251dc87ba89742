//! A store that fails at the call it is told to, in the ways that stores fail; or that ends the
//! process there.

use std::fmt;
use std::io::{Error as IoError, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload,
    PutResult, Result, UploadPart,
};

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Failure {
    /// It is done, and no answer comes.
    TimeOut,
    /// 503: ask again later.
    SlowDown,
    /// Of what is read, half comes. Writes are not concerned.
    Truncated,
    /// The credentials were good until now.
    Expired,
    /// No space is left; half of what was to be written lies under a staging name.
    DiskFull,
    /// The process ends before the call, with half of it done, or before its answer.
    Crash(Moment),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Moment {
    Before,
    Halfway,
    After,
}

/// Which calls fail, and how.
#[derive(Clone, Debug)]
pub struct Plan {
    pub failure: Failure,
    /// The first.
    pub at: usize,
    /// Whether all later ones fail too.
    pub stays: bool,
    pub calls: Arc<AtomicUsize>,
}

impl Plan {
    pub fn new(failure: Failure, at: usize, stays: bool) -> Self {
        Self { failure, at, stays, calls: Arc::default() }
    }

    /// Calls made so far.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    /// What becomes of the next call.
    fn next(&self) -> Option<Failure> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        (call == self.at || self.stays && call > self.at).then_some(self.failure)
    }

    /// Runs a call that writes `half` when it fails halfway.
    async fn call<T>(
        &self,
        run: impl Future<Output = Result<T>>,
        half: impl Future<Output = ()>,
    ) -> Result<T> {
        fail(self.next(), run, half).await
    }
}

async fn fail<T>(
    failure: Option<Failure>,
    run: impl Future<Output = Result<T>>,
    half: impl Future<Output = ()>,
) -> Result<T> {
    match failure {
        None | Some(Failure::Truncated) => run.await,
        Some(Failure::TimeOut) => {
            let _ = run.await;
            Err(io(ErrorKind::TimedOut))
        }
        Some(Failure::SlowDown) => Err(answer("503 Service Unavailable", "SlowDown")),
        Some(Failure::Expired) => Err(answer("400 Bad Request", "ExpiredToken")),
        Some(Failure::DiskFull) => {
            half.await;
            Err(io(ErrorKind::StorageFull))
        }
        Some(Failure::Crash(moment)) => {
            match moment {
                Moment::Before => {}
                Moment::Halfway => half.await,
                Moment::After => drop(run.await),
            }
            std::process::abort()
        }
    }
}

fn io(kind: ErrorKind) -> Error {
    Error::Generic { store: "failing", source: Box::new(IoError::from(kind)) }
}

/// As the library tells of an S3 server's answer.
fn answer(status: &str, code: &str) -> Error {
    let text = format!(
        "Server returned non-2xx status code: {status}: <Error><Code>{code}</Code></Error>"
    );
    Error::Generic { store: "failing", source: text.into() }
}

#[derive(Debug)]
pub struct FailingStore {
    inner: Arc<dyn ObjectStore>,
    plan: Plan,
}

impl FailingStore {
    pub fn new(inner: Arc<dyn ObjectStore>, plan: Plan) -> Self {
        Self { inner, plan }
    }

    /// What a write that breaks off leaves in a folder: half of it, under a name that is not listed.
    async fn half(&self, location: &Path, payload: &PutPayload) {
        let bytes: Vec<u8> = payload.iter().flatten().copied().collect();
        let staging = Path::from_iter(location.parts().map(|part| part.as_ref().to_owned()));
        let half = bytes[..bytes.len() / 2].to_vec();
        let _ = self.inner.put(&Path::from(format!("{staging}.half")), half.into()).await;
    }
}

impl fmt::Display for FailingStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a store that fails")
    }
}

#[async_trait]
impl ObjectStore for FailingStore {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let run = self.inner.put_opts(location, payload.clone(), options);
        self.plan.call(run, self.half(location, &payload)).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let run = self.inner.put_multipart_opts(location, options);
        let inner = self.plan.call(run, async {}).await?;
        Ok(Box::new(FailingUpload { inner, plan: self.plan.clone() }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let failure = self.plan.next();
        let is_head = options.head;
        let found = fail(failure, self.inner.get_opts(location, options), async {}).await?;
        if failure != Some(Failure::Truncated) || is_head {
            return Ok(found);
        }
        let (meta, range, attributes, extensions) = (
            found.meta.clone(),
            found.range.clone(),
            found.attributes.clone(),
            found.extensions.clone(),
        );
        let bytes = found.bytes().await?;
        let half = bytes.slice(..bytes.len() / 2);
        let payload = GetResultPayload::Stream(futures::stream::iter([Ok(half)]).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let (inner, plan) = (self.inner.clone(), self.plan.clone());
        let delete = move |location: Path| {
            let (inner, plan) = (inner.clone(), plan.clone());
            async move { plan.call(inner.delete(&location), async {}).await.map(|()| location) }
        };
        locations.and_then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (inner, plan, prefix) = (self.inner.clone(), self.plan.clone(), prefix.cloned());
        // One call: what these tests list fits into one answer.
        let listed = async move {
            let found = inner.list(prefix.as_ref()).try_collect::<Vec<_>>();
            let found = plan.call(found, async {}).await?;
            Ok::<_, Error>(futures::stream::iter(found.into_iter().map(Ok)))
        };
        futures::stream::once(listed).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.plan.call(self.inner.list_with_delimiter(prefix), async {}).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.plan.call(self.inner.copy_opts(from, to, options), async {}).await
    }
}

#[derive(Debug)]
struct FailingUpload {
    inner: Box<dyn MultipartUpload>,
    plan: Plan,
}

#[async_trait]
impl MultipartUpload for FailingUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (plan, part) = (self.plan.clone(), self.inner.put_part(data));
        Box::pin(async move { plan.call(part, async {}).await })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let plan = self.plan.clone();
        plan.call(self.inner.complete(), async {}).await
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}
