//! The socket under a connection: it sees when a header begins, and completes what hyper says by itself.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use http::HeaderValue;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Instant,
};

use crate::role::STACK_HEADER;

use super::{ConnectionState, Head};

/// The start of every HTTP/2 connection with prior knowledge.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A socket that tells when a request's header begins, and that can be looked into before HTTP starts.
///
/// It only borrows the socket: what is left to do with it when HTTP is over is not HTTP's.
pub(super) struct Io<'a> {
    stream: &'a mut TcpStream,
    replay: Bytes,
    state: Arc<ConnectionState>,
    stack: HeaderValue,
    /// What is left to write of an answer that has been completed.
    unsent: Bytes,
}

impl<'a> Io<'a> {
    pub(super) fn new(stream: &'a mut TcpStream, state: Arc<ConnectionState>, stack: HeaderValue) -> Self {
        Self {
            stream,
            replay: Bytes::new(),
            state,
            stack,
            unsent: Bytes::new(),
        }
    }

    /// What hyper answers by itself, to a header that it cannot read, with the name of the stack. None for what has
    /// gone through [`super::answer`].
    fn completed(&self, bytes: &[u8]) -> Option<Bytes> {
        let head = bytes.strip_prefix(b"HTTP/1.1 4")?;
        let line = head.iter().position(|byte| *byte == b'\n')? + 1;
        let named = head
            .windows(STACK_HEADER.len())
            .any(|window| window == STACK_HEADER.as_bytes());
        if named {
            return None;
        }
        let (status, rest) = head.split_at_checked(line)?;
        let parts: [&[u8]; 6] = [
            b"HTTP/1.1 4",
            status,
            STACK_HEADER.as_bytes(),
            b": ",
            self.stack.as_bytes(),
            b"\r\n",
        ];
        Some([&parts.concat(), rest].concat().into())
    }

    fn poll_write_unsent(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unsent.is_empty() {
            let written = ready!(Pin::new(&mut *self.stream).poll_write(context, &self.unsent))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unsent.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    /// Reads as much as it takes to know whether the client speaks HTTP/2.
    pub(super) async fn sniff(&mut self) -> io::Result<bool> {
        let mut seen = Vec::with_capacity(PREFACE.len());
        while seen.len() < PREFACE.len() && PREFACE.starts_with(&seen) {
            if (&mut *self.stream)
                .take((PREFACE.len() - seen.len()) as u64)
                .read_buf(&mut seen)
                .await?
                == 0
            {
                break;
            }
            self.began();
        }
        let is_http2 = seen == PREFACE;
        self.replay = seen.into();
        Ok(is_http2)
    }

    fn began(&self) {
        self.state.head.send_if_modified(|head| {
            let idle = *head == Head::Idle;
            if idle {
                *head = Head::Began(Instant::now());
            }
            idle
        });
    }
}

impl AsyncRead for Io<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.replay.is_empty() {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut *self.stream).poll_read(context, buffer))?;
            if buffer.filled().len() > before {
                self.began();
            }
        } else {
            let length = self.replay.len().min(buffer.remaining());
            buffer.put_slice(&self.replay.split_to(length));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Io<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_write_unsent(context))?;
        let Some(completed) = self.completed(bytes) else {
            return Pin::new(&mut *self.stream).poll_write(context, bytes);
        };
        self.unsent = completed;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_unsent(context))?;
        Pin::new(&mut *self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_unsent(context))?;
        Pin::new(&mut *self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_write_unsent(context))?;
        match slices.first() {
            Some(first) if self.completed(first).is_some() => self.poll_write(context, first),
            _ => Pin::new(&mut *self.stream).poll_write_vectored(context, slices),
        }
    }
}
