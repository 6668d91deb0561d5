//! Response bodies: short texts, and expositions that are formatted while they are sent.

use std::io::Write;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use hyper::body::{Body, Frame, SizeHint};

use crate::metrics::text::Exposition;

/// Bytes formatted at a time, before compression.
const PIECE: usize = 64 << 10;

/// A response body.
#[derive(Debug)]
pub struct Payload(Source);

#[derive(Debug)]
enum Source {
    Full(Bytes),
    Plain(Box<Exposition>),
    Gzip(Box<Exposition>, GzEncoder<Vec<u8>>),
    Finished,
}

impl Payload {
    pub(super) fn empty() -> Self {
        Self::full(Bytes::new())
    }

    pub(super) fn full(text: Bytes) -> Self {
        Self(if text.is_empty() { Source::Finished } else { Source::Full(text) })
    }

    pub(super) fn exposition(exposition: Exposition, gzip: bool) -> Self {
        let exposition = Box::new(exposition);
        Self(if gzip {
            Source::Gzip(exposition, GzEncoder::new(Vec::new(), Compression::fast()))
        } else {
            Source::Plain(exposition)
        })
    }

    /// The next piece; an error only if compression fails.
    fn next(&mut self) -> std::io::Result<Option<Bytes>> {
        match std::mem::replace(&mut self.0, Source::Finished) {
            Source::Full(text) => Ok(Some(text)),
            Source::Plain(mut exposition) => {
                let mut piece = Vec::with_capacity(PIECE + 1024);
                if exposition.write(&mut piece, PIECE) {
                    self.0 = Source::Plain(exposition);
                }
                Ok(Some(piece.into()))
            }
            Source::Gzip(mut exposition, mut encoder) => {
                let mut piece = Vec::with_capacity(PIECE + 1024);
                let more = exposition.write(&mut piece, PIECE);
                encoder.write_all(&piece)?;
                if !more {
                    return Ok(Some(encoder.finish()?.into()));
                }
                let compressed = std::mem::take(encoder.get_mut());
                self.0 = Source::Gzip(exposition, encoder);
                Ok(Some(compressed.into()))
            }
            Source::Finished => Ok(None),
        }
    }
}

impl Body for Payload {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.next() {
            Ok(Some(piece)) if piece.is_empty() => {
                // The encoder has kept it all for the next piece; others may run first.
                context.waker().wake_by_ref();
                Poll::Pending
            }
            Ok(piece) => Poll::Ready(piece.map(|piece| Ok(Frame::data(piece)))),
            Err(error) => Poll::Ready(Some(Err(error))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.0, Source::Finished)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Source::Full(text) => SizeHint::with_exact(text.len() as u64),
            Source::Finished => SizeHint::with_exact(0),
            _ => SizeHint::default(),
        }
    }
}
