//! What was read from a server and is not parsed yet, in blocks that are used again.
//!
//! A block is mapped by the kernel instead of allocated on the heap. Its memory is zeroed once and not before each read,
//! and the blocks of a burst are given back as soon as their messages are processed, which an allocator may not do.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use memmap2::{MmapMut, MmapOptions};
use tokio::io::{AsyncRead, AsyncReadExt};

/// The least room for a read, in bytes.
pub(super) const READ_SIZE: usize = 64 << 10;
/// The size of a block, in bytes. A larger one holds a message that does not fit.
const BLOCK_SIZE: usize = 2 * READ_SIZE;
/// Maximum number of blocks that are kept for the next reads. A short burst needs no more (src/session/pace.rs).
const MAX_SPARE: usize = 24;
/// Fewer bytes than this are copied, so that they do not keep a whole block.
const MIN_SHARED: usize = READ_SIZE / 4;

#[derive(Default)]
pub(super) struct ReadBuffer {
    /// Mapped by the first read.
    block: Option<MmapMut>,
    start: usize,
    end: usize,
    spare: Arc<SpareBlocks>,
}

impl ReadBuffer {
    /// What is not parsed yet.
    pub(super) fn bytes(&self) -> &[u8] {
        self.block.as_deref().map_or(&[], |block| &block[self.start..self.end])
    }

    /// Waits for bytes, and returns their number. Cancelling loses nothing.
    pub(super) async fn read_from(&mut self, stream: &mut (impl AsyncRead + Unpin + ?Sized)) -> io::Result<usize> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            self.block.take_if(|block| block.len() > BLOCK_SIZE);
        }
        let room = self.room();
        let block = match self.block.take() {
            Some(block) if block.len() - self.end >= room => block,
            full => {
                let next = self.next_block(full.as_ref())?;
                self.spare.put(full);
                next
            }
        };
        let block = self.block.insert(block);
        // What follows a large message must not fill the rest of a large block, because it is moved out of that block.
        let end = block.len().min(self.end + BLOCK_SIZE);
        let count = stream.read(&mut block[self.end..end]).await?;
        self.end += count;
        Ok(count)
    }

    /// The least room for the next read. Doubling keeps the cost of moving the start of a large message linear.
    fn room(&self) -> usize {
        READ_SIZE.max(self.end - self.start)
    }

    /// Another block, with a copy of what is not parsed yet, and with room.
    fn next_block(&mut self, full: Option<&MmapMut>) -> io::Result<MmapMut> {
        let bytes = full.map_or(&[][..], |block| &block[self.start..self.end]);
        let mut block = self.spare.take((bytes.len() + self.room()).max(BLOCK_SIZE))?;
        block[..bytes.len()].copy_from_slice(bytes);
        (self.start, self.end) = (0, bytes.len());
        Ok(block)
    }

    /// Drops the first bytes.
    pub(super) fn skip(&mut self, count: usize) {
        self.start += count;
    }

    /// Takes the first bytes, without a copy unless there are few.
    pub(super) fn take(&mut self, count: usize) -> io::Result<Bytes> {
        if count < MIN_SHARED {
            let taken = Bytes::copy_from_slice(&self.bytes()[..count]);
            self.skip(count);
            return Ok(taken);
        }
        let taken = self.start..self.start + count;
        self.skip(count);
        let full = self.block.take();
        self.block = Some(self.next_block(full.as_ref())?);
        let shared = SharedBlock { block: full, spare: Arc::clone(&self.spare) };
        Ok(Bytes::from_owner(shared).slice(taken))
    }
}

/// Blocks that hold no messages any more.
#[derive(Default)]
struct SpareBlocks(Mutex<Vec<MmapMut>>);

impl SpareBlocks {
    /// A block of at least `size` bytes, with any content.
    fn take(&self, size: usize) -> io::Result<MmapMut> {
        let spare = if size == BLOCK_SIZE { self.lock().pop() } else { None };
        spare.map_or_else(|| MmapOptions::new().len(size).map_anon(), Ok)
    }

    fn put(&self, block: Option<MmapMut>) {
        let mut spare = self.lock();
        if spare.len() < MAX_SPARE {
            spare.extend(block.filter(|block| block.len() == BLOCK_SIZE));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<MmapMut>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The block of the messages of a batch. Used again once all of them are dropped.
struct SharedBlock {
    block: Option<MmapMut>,
    spare: Arc<SpareBlocks>,
}

impl AsRef<[u8]> for SharedBlock {
    fn as_ref(&self) -> &[u8] {
        self.block.as_deref().unwrap_or_default()
    }
}

impl Drop for SharedBlock {
    fn drop(&mut self) {
        self.spare.put(self.block.take());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spare_blocks(buffer: &ReadBuffer) -> usize {
        buffer.spare.lock().len()
    }

    async fn read_all(buffer: &mut ReadBuffer, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            buffer.read_from(&mut bytes).await.unwrap();
        }
    }

    proptest! {
        /// What is taken and skipped is what was read, and what was taken does not change.
        #[test]
        fn bytes_come_out_as_they_went_in(
            steps in proptest::collection::vec((0..3 * BLOCK_SIZE, 0..4 * BLOCK_SIZE, any::<bool>()), 1..12),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let stream: Vec<u8> = (0..=250).cycle().take(steps.iter().map(|step| step.0).sum()).collect();
            let (mut buffer, mut read, mut parsed, mut taken) = (ReadBuffer::default(), 0, 0, Vec::new());
            for (arriving, consumed, is_taken) in steps {
                runtime.block_on(read_all(&mut buffer, &stream[read..read + arriving]));
                read += arriving;
                prop_assert!(buffer.bytes() == &stream[parsed..read]);
                let consumed = consumed.min(read - parsed);
                if is_taken {
                    taken.push((parsed, buffer.take(consumed).unwrap()));
                } else {
                    buffer.skip(consumed);
                }
                parsed += consumed;
            }
            for (start, bytes) in taken {
                prop_assert!(bytes == stream[start..start + bytes.len()]);
            }
        }
    }

    #[tokio::test]
    async fn a_block_is_used_again_once_all_its_messages_are_dropped() {
        let mut buffer = ReadBuffer::default();
        for _ in 0..5 {
            read_all(&mut buffer, &[b'x'; MIN_SHARED]).await;
            let bytes = buffer.take(MIN_SHARED).unwrap();
            let messages = [bytes.slice(..10), bytes.slice(10..)];
            assert_eq!(spare_blocks(&buffer), 0);
            drop((bytes, messages));
            assert_eq!(spare_blocks(&buffer), 1);
        }
    }

    #[tokio::test]
    async fn blocks_beyond_the_limit_and_large_ones_are_given_back() {
        let mut buffer = ReadBuffer::default();
        let mut batches = Vec::new();
        for _ in 0..2 * MAX_SPARE {
            read_all(&mut buffer, &[b'x'; MIN_SHARED]).await;
            batches.push(buffer.take(MIN_SHARED).unwrap());
        }
        drop(batches);
        assert_eq!(spare_blocks(&buffer), MAX_SPARE);
    }

    #[tokio::test]
    async fn what_follows_a_large_message_is_read_in_small_pieces() {
        let mut buffer = ReadBuffer::default();
        read_all(&mut buffer, &vec![b'x'; 10 * BLOCK_SIZE]).await;
        let count = buffer.read_from(&mut vec![b'y'; 4 * BLOCK_SIZE].as_slice()).await.unwrap();
        assert_eq!(count, BLOCK_SIZE);
        buffer.skip(10 * BLOCK_SIZE);
        assert_eq!(buffer.take(count).unwrap(), vec![b'y'; BLOCK_SIZE]);
        read_all(&mut buffer, b"x").await;
        assert_eq!(buffer.block.as_ref().map(|block| block.len()), Some(BLOCK_SIZE));
    }
}
