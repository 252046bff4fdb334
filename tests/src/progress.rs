//! What a person sees while something takes long: one line that is rewritten on a terminal, and a new line
//! every few seconds in a log. Time goes on in both, also while there is nothing to tell.

use std::{
    fs::{File, TryLockError},
    io::{self, IsTerminal, Write, stderr},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How often a log (not a terminal) gets a line.
const LOG_EVERY: Duration = Duration::from_secs(15);
/// How often the line on a terminal shows how long it has taken.
const TERMINAL_EVERY: Duration = Duration::from_secs(1);
/// How much of a line is shown on a terminal: a longer one would not be rewritten but repeated.
const WIDTH: usize = 110;

/// A running step: what is being done, how far it is, how long it has taken.
#[derive(Debug)]
pub struct Step {
    line: Arc<Line>,
    clock: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Line {
    title: String,
    started: Instant,
    terminal: bool,
    state: Mutex<State>,
    over: Condvar,
}

#[derive(Debug, Default)]
struct State {
    detail: String,
    is_over: bool,
}

impl Step {
    /// Starts the step and says so.
    pub fn start(title: impl Into<String>) -> Self {
        let terminal = stderr().is_terminal();
        let every = if terminal { TERMINAL_EVERY } else { LOG_EVERY };
        Self::start_on(title.into(), terminal, every, write)
    }

    fn start_on(title: String, terminal: bool, every: Duration, write: fn(&str)) -> Self {
        let line = Arc::new(Line {
            title,
            started: Instant::now(),
            terminal,
            state: Mutex::default(),
            over: Condvar::new(),
        });
        write(&line.text(""));
        let shown = Arc::clone(&line);
        let clock = thread::spawn(move || {
            let mut state = shown.lock();
            loop {
                let waited = shown
                    .over
                    .wait_timeout_while(state, every, |state| !state.is_over);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                if state.is_over {
                    return;
                }
                let seconds = shown.started.elapsed().as_secs();
                write(&shown.text(&format!(" ({seconds} s) {}", state.detail)));
            }
        });
        Self {
            line,
            clock: Some(clock),
        }
    }

    /// Tells how far the step is. Cheap enough to be called for every small piece of work.
    pub fn update(&mut self, detail: &str) {
        detail.clone_into(&mut self.line.lock().detail);
    }

    /// Ends the step with its time, in seconds with one decimal.
    pub fn done(mut self) -> Duration {
        self.stop_the_clock();
        let took = self.line.started.elapsed();
        let start = if self.line.terminal { "\r\x1b[2K" } else { "" };
        write(&format!(
            "{start}  ✓ {} ({:.1} s)\n",
            self.line.title,
            took.as_secs_f64()
        ));
        took
    }

    /// False if it was stopped before.
    fn stop_the_clock(&mut self) -> bool {
        self.line.lock().is_over = true;
        self.line.over.notify_all();
        self.clock.take().is_some_and(|clock| clock.join().is_ok())
    }
}

/// A step that is not done has failed: what is said about it begins on a line of its own.
impl Drop for Step {
    fn drop(&mut self) {
        if self.stop_the_clock() && self.line.terminal {
            write("\n");
        }
    }
}

impl Line {
    fn text(&self, more: &str) -> String {
        let line = format!("  … {}{more}", self.title);
        if self.terminal {
            format!("\r\x1b[2K{}", line.chars().take(WIDTH).collect::<String>())
        } else {
            line + "\n"
        }
    }

    /// Nothing that is done while it is held can leave it half changed.
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Standard error may be closed; progress is not worth failing for.
fn write(text: &str) {
    let mut out = stderr().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Says one line to the person at the terminal.
pub fn say(line: impl AsRef<str>) {
    let _ = writeln!(stderr().lock(), "{}", line.as_ref());
}

/// Locks a file, and says for what it waits if it must.
///
/// # Errors
/// If the file cannot be locked at all.
pub fn lock(file: &File, waits_for: &str) -> io::Result<()> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            let step = Step::start(format!("waiting for {waits_for}"));
            file.lock()?;
            step.done();
            Ok(())
        }
        Err(TryLockError::Error(error)) => Err(error),
        Ok(()) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::wait_until;

    static WRITTEN: Mutex<String> = Mutex::new(String::new());

    fn keep(text: &str) {
        WRITTEN.lock().expect("no panic").push_str(text);
    }

    #[test]
    fn time_goes_on_while_there_is_nothing_to_tell() {
        let mut step = Step::start_on("linking".into(), false, Duration::from_millis(5), keep);
        step.update("kubelet");
        wait_until("two more lines", Duration::from_mins(1), || {
            WRITTEN.lock().expect("no panic").matches("s) kubelet\n").count() >= 2
        })
        .expect("the clock writes");
        assert!(WRITTEN.lock().expect("no panic").starts_with("  … linking\n"));
    }
}
