//! A way into a pod of the cluster, by `kubectl port-forward`.

use std::{
    io::{BufRead, BufReader},
    process::{Child, ChildStdout},
};

use anyhow::{Context, Result};

use crate::kubectl::Session;

/// A port of this machine that leads to one of a pod, until it is dropped.
#[derive(Debug)]
pub struct Tunnel {
    child: Child,
    /// Kept open: `kubectl` tells of each connection, and would end if it could not.
    _told: BufReader<ChildStdout>,
    /// Of 127.0.0.1.
    pub port: u16,
}

impl Tunnel {
    /// Opens one to a port of a pod, or of one of a Service's pods (`service/exchange-nats`).
    ///
    /// # Errors
    /// If there is none that runs.
    pub fn open(session: &Session, namespace: &str, to: &str, port: u16) -> Result<Self> {
        let ports = format!(":{port}");
        let mut child = session.follow(&["port-forward", "--namespace", namespace, to, &ports])?;
        let output = child.stdout.take().context("no output of `kubectl`")?;
        let mut told = BufReader::new(output);
        let mut line = String::new();
        told.read_line(&mut line)?;
        let port = line
            .strip_prefix("Forwarding from 127.0.0.1:")
            .and_then(|rest| rest.split(' ').next()?.parse().ok())
            .with_context(|| format!("`kubectl port-forward` to {to} said: {line:?}"))?;
        Ok(Self {
            child,
            _told: told,
            port,
        })
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
