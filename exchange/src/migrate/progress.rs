//! How far a batch has come.

use std::time::Duration;

use tokio::time::Instant;

/// How often that is told.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// What a batch has done since this process began with it, whatever it had to wait for meanwhile.
#[derive(Debug)]
pub(super) struct Progress {
    /// The batch, in words.
    pub(super) batch: String,
    /// Rows changed so far.
    pub(super) rows: u64,
    /// How many there are to change, more or less; none if nobody has counted them.
    pub(super) whole: Option<i64>,
    began: Instant,
    told: Instant,
}

impl Progress {
    /// Of a batch that begins.
    pub(super) fn begin(batch: String, now: Instant) -> Self {
        Self {
            batch,
            rows: 0,
            whole: None,
            began: now,
            told: now,
        }
    }

    /// Adds a portion. Returns what to tell, if nothing has been told for a while.
    pub(super) fn add(&mut self, rows: u64, now: Instant) -> Option<String> {
        self.rows += rows;
        if now - self.told < TELL_EVERY {
            return None;
        }
        self.told = now;
        let seconds = (now - self.began).as_secs().max(1);
        Some(format!(
            "{}: {}, {} per second",
            self.batch,
            self.so_far(),
            self.rows / seconds
        ))
    }

    /// The rows, in words.
    pub(super) fn so_far(&self) -> String {
        match self.whole {
            Some(whole) => format!("{} of about {whole} rows", self.rows),
            None => format!("{} rows", self.rows),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_now_and_then_how_far_a_batch_has_come_and_how_fast() {
        let began = Instant::now();
        let mut progress = Progress::begin("batch 4 of 5".to_owned(), began);
        progress.whole = Some(4000);
        let mut add = |after: Duration| progress.add(500, began + after);
        let told = |text: &str| Some(format!("batch 4 of 5: {text}"));
        assert_eq!(add(TELL_EVERY / 2), None);
        assert_eq!(add(TELL_EVERY), told("1000 of about 4000 rows, 200 per second"));
        assert_eq!(add(TELL_EVERY + TELL_EVERY / 2), None);
        assert_eq!(
            add(TELL_EVERY * 2),
            told("2000 of about 4000 rows, 200 per second")
        );
        let mut uncounted = Progress::begin("batch 4 of 5".to_owned(), began);
        assert_eq!(
            uncounted.add(500, began + TELL_EVERY),
            told("500 rows, 100 per second")
        );
    }
}
