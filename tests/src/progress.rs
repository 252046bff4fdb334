//! What a person sees while something takes long: one line that is rewritten on a terminal, and a new line
//! every few seconds in a log.

use std::{
    io::{IsTerminal, Write, stderr},
    time::{Duration, Instant},
};

/// How often a log (not a terminal) gets a line.
const LOG_EVERY: Duration = Duration::from_secs(15);

/// A running step: what is being done, how far it is, how long it has taken.
#[derive(Debug)]
pub struct Step {
    title: String,
    started: Instant,
    last_log: Instant,
    terminal: bool,
}

impl Step {
    /// Starts the step and says so.
    pub fn start(title: impl Into<String>) -> Self {
        let step = Self {
            title: title.into(),
            started: Instant::now(),
            last_log: Instant::now(),
            terminal: stderr().is_terminal(),
        };
        if step.terminal {
            step.write(&format!("\r\x1b[2K  … {}", step.title));
        } else {
            step.write(&format!("  … {}\n", step.title));
        }
        step
    }

    /// Tells how far the step is. Cheap enough to be called for every small piece of work.
    pub fn update(&mut self, detail: &str) {
        let seconds = self.started.elapsed().as_secs();
        if self.terminal {
            let line: String = format!("  … {} ({seconds} s) {detail}", self.title)
                .chars()
                .take(110)
                .collect();
            self.write(&format!("\r\x1b[2K{line}"));
        } else if self.last_log.elapsed() >= LOG_EVERY {
            self.last_log = Instant::now();
            self.write(&format!("  … {} ({seconds} s) {detail}\n", self.title));
        }
    }

    /// Ends the step with its time, in seconds with one decimal.
    pub fn done(self) -> Duration {
        let took = self.started.elapsed();
        let start = if self.terminal { "\r\x1b[2K" } else { "" };
        self.write(&format!(
            "{start}  ✓ {} ({:.1} s)\n",
            self.title,
            took.as_secs_f64()
        ));
        took
    }

    /// Standard error may be closed; progress is not worth failing for.
    #[expect(clippy::unused_self, reason = "one way to write, used by all methods")]
    fn write(&self, text: &str) {
        let mut out = stderr().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

/// Says one line to the person at the terminal.
pub fn say(line: impl AsRef<str>) {
    let _ = writeln!(stderr().lock(), "{}", line.as_ref());
}
