//! Copies a data channel from the store to this host: a file, or a folder with all below it.
//!
//! What appears at its final name is whole: everything is written under a temporary name beside it
//! first. A result that is already there is taken as it is.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Component, Path, PathBuf};

use futures::{FutureExt, StreamExt, TryStreamExt, stream};

use crate::error::StoreError;
use crate::store::{ObjectInfo, Store, with_retries};

/// Bytes asked for at once; bounds the memory of a copy.
const CHUNK_BYTES: u64 = 8 << 20;
/// Files copied at once; a folder of images is mostly waiting. With the chunk, 64 MiB of memory.
const FILES_AT_ONCE: usize = 8;

impl Store {
    /// Copies the object or the folder `prefix_or_key` (empty: what the store's URI itself names)
    /// into the folder `to`, under its own last name, and returns where it lies.
    pub async fn download(&self, prefix_or_key: &str, to: &Path) -> Result<PathBuf, StoreError> {
        let name = self.last_name(prefix_or_key);
        let target = to.join(name);
        if target.exists() {
            return Ok(target);
        }
        std::fs::create_dir_all(to).map_err(|error| StoreError::host(to, &error))?;
        let staged = tempfile::Builder::new().prefix(".download-").tempdir_in(to);
        let staged = staged.map_err(|error| StoreError::host(to, &error))?;
        let content = staged.path().join("content");
        match self.size(prefix_or_key).await {
            Ok(bytes) => self.copy(prefix_or_key, bytes, &content).await?,
            Err(StoreError::NotFound { .. }) => self.copy_below(prefix_or_key, &content).await?,
            Err(error) => return Err(error),
        }
        match std::fs::rename(&content, &target) {
            Ok(()) => Ok(target),
            // Another process on this host was faster; its copy is whole too.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists
                ) =>
            {
                Ok(target)
            }
            Err(error) => Err(StoreError::host(&target, &error)),
        }
    }

    async fn copy_below(&self, prefix: &str, content: &Path) -> Result<(), StoreError> {
        let objects = self.list(prefix).await?;
        if objects.is_empty() {
            let (key, place) = (prefix.to_owned(), self.place().clone());
            return Err(StoreError::NotFound { key, place });
        }
        let copies: Vec<_> = objects
            .into_iter()
            .map(|object| self.copy_one_below(prefix, object, content).boxed())
            .collect();
        stream::iter(copies).buffer_unordered(FILES_AT_ONCE).try_collect().await
    }

    async fn copy_one_below(
        &self,
        prefix: &str,
        ObjectInfo { key, bytes }: ObjectInfo,
        content: &Path,
    ) -> Result<(), StoreError> {
        let relative = key.strip_prefix(prefix).unwrap_or(&key).trim_start_matches('/');
        let relative = Path::new(relative);
        // A key is somebody else's text: it must not lead out of the folder.
        if !relative.components().all(|part| matches!(part, Component::Normal(_))) {
            let problem = "it would leave the folder it is copied to".to_owned();
            return Err(StoreError::Key { key, problem });
        }
        let path = content.join(relative);
        let parent = path.parent().unwrap_or(content);
        std::fs::create_dir_all(parent).map_err(|error| StoreError::host(parent, &error))?;
        self.copy(&key, bytes, &path).await
    }

    async fn copy(&self, key: &str, bytes: u64, path: &Path) -> Result<(), StoreError> {
        let failed = |error| StoreError::host(path, &error);
        let mut file = File::create(path).map_err(failed)?;
        let mut start = 0;
        while start < bytes {
            let end = bytes.min(start + CHUNK_BYTES);
            let chunk = with_retries(|| self.get_range(key, start..end)).await?;
            file.write_all(&chunk).map_err(failed)?;
            start = end;
        }
        file.sync_all().map_err(failed)
    }
}
