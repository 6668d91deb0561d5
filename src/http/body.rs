//! Response bodies: short texts, and expositions that are encoded in chunks while they are sent.

use std::io::Write;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use hyper::body::{Body, Frame, SizeHint};

use prometheus::HistogramTimer;

use crate::metrics::encode::Exposition;

/// The size of a chunk in bytes, before compression. A chunk may exceed it by the last line.
const CHUNK_SIZE: usize = 64 << 10;

/// A response body.
#[derive(Debug)]
pub struct ResponseBody {
    source: Source,
    /// Observes the duration of the scrape when the body is dropped.
    _timer: Option<HistogramTimer>,
}

#[derive(Debug)]
enum Source {
    Full(Bytes),
    Plain(Box<Exposition>),
    Gzip(Box<Exposition>, GzEncoder<Vec<u8>>),
    Finished,
}

impl ResponseBody {
    pub(super) fn empty() -> Self {
        Self::full(Bytes::new())
    }

    pub(super) fn full(text: Bytes) -> Self {
        let source = if text.is_empty() { Source::Finished } else { Source::Full(text) };
        Self { source, _timer: None }
    }

    pub(super) fn exposition(exposition: Exposition, gzip: bool, timer: HistogramTimer) -> Self {
        let exposition = Box::new(exposition);
        let source = if gzip {
            Source::Gzip(exposition, GzEncoder::new(Vec::new(), Compression::fast()))
        } else {
            Source::Plain(exposition)
        };
        Self { source, _timer: Some(timer) }
    }

    /// Encodes the next chunk. It is empty while the compressor still buffers its output.
    ///
    /// # Errors
    /// Returns an error if compression fails.
    fn next_chunk(&mut self) -> std::io::Result<Option<Bytes>> {
        match std::mem::replace(&mut self.source, Source::Finished) {
            Source::Full(text) => Ok(Some(text)),
            Source::Plain(mut exposition) => {
                let mut chunk = Vec::with_capacity(CHUNK_SIZE + 1024);
                if exposition.write(&mut chunk, CHUNK_SIZE) {
                    self.source = Source::Plain(exposition);
                }
                Ok(Some(chunk.into()))
            }
            Source::Gzip(mut exposition, mut encoder) => {
                let mut chunk = Vec::with_capacity(CHUNK_SIZE + 1024);
                let has_more = exposition.write(&mut chunk, CHUNK_SIZE);
                encoder.write_all(&chunk)?;
                if !has_more {
                    return Ok(Some(encoder.finish()?.into()));
                }
                let compressed = std::mem::take(encoder.get_mut());
                self.source = Source::Gzip(exposition, encoder);
                Ok(Some(compressed.into()))
            }
            Source::Finished => Ok(None),
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.next_chunk() {
            Ok(Some(chunk)) if chunk.is_empty() => {
                // The compressor has buffered the whole chunk. Yield to other tasks before the next one.
                context.waker().wake_by_ref();
                Poll::Pending
            }
            Ok(chunk) => Poll::Ready(chunk.map(|chunk| Ok(Frame::data(chunk)))),
            Err(error) => Poll::Ready(Some(Err(error))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.source, Source::Finished)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Full(text) => SizeHint::with_exact(text.len() as u64),
            Source::Finished => SizeHint::with_exact(0),
            _ => SizeHint::default(),
        }
    }
}
