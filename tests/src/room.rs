//! Room on the machine for tests that go on side by side, given to them in the order of their names.

use std::{
    collections::BTreeSet,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

/// As many tests side by side as `make e2e` has threads for, or fewer of those that take more of it.
pub const WHOLE: usize = 3;

static ROOM: Mutex<Room> = Mutex::new(Room {
    free: WHOLE,
    waiting: BTreeSet::new(),
});
static CHANGED: Condvar = Condvar::new();

#[derive(Debug)]
struct Room {
    free: usize,
    /// Names of tests.
    waiting: BTreeSet<String>,
}

/// Asked for, but not given yet.
#[derive(Debug)]
pub struct Queued {
    name: String,
}

/// What a test has, until it drops it.
#[derive(Debug)]
pub struct Place {
    size: usize,
}

fn room() -> MutexGuard<'static, Room> {
    ROOM.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queued {
    /// The test of this thread waits.
    pub fn here() -> Self {
        Self::in_place_of(0)
    }

    /// It waits, and gives back what it has: at the same time, so that nobody of a later name comes between.
    fn in_place_of(size: usize) -> Self {
        let name = thread::current().name().unwrap_or_default().to_owned();
        let mut room = room();
        room.free += size;
        room.waiting.insert(name.clone());
        CHANGED.notify_all();
        Self { name }
    }

    /// Waits until there is as much room as that, and nobody waits whose name comes before.
    pub fn place(self, size: usize) -> Place {
        let mut room = room();
        while room.free < size || room.waiting.first() != Some(&self.name) {
            room = CHANGED.wait(room).unwrap_or_else(PoisonError::into_inner);
        }
        room.free -= size;
        // Dropped, it leaves the queue.
        drop(room);
        Place { size }
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        room().waiting.remove(&self.name);
        CHANGED.notify_all();
    }
}

impl Place {
    /// Gives this back for one of another size.
    pub fn resize(&mut self, size: usize) {
        let queued = Queued::in_place_of(std::mem::take(&mut self.size));
        *self = queued.place(size);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        room().free += self.size;
        CHANGED.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::mpsc::{Receiver, Sender, channel},
        thread::{Builder, JoinHandle},
        time::Duration,
    };

    use super::*;

    /// A test of this name that wants so much, and then so much; each step waits for a word.
    struct Named {
        told: Sender<()>,
        has: Receiver<usize>,
        thread: JoinHandle<()>,
    }

    fn begin(name: &str, sizes: &'static [usize]) -> Named {
        let (told, words) = channel();
        let (tell, has) = channel();
        let queued = channel();
        let work = move || {
            let mut queue = Some(Queued::here());
            queued.0.send(()).unwrap();
            let mut place: Option<Place> = None;
            for size in sizes {
                match &mut place {
                    None => place = queue.take().map(|queue| queue.place(*size)),
                    Some(place) => place.resize(*size),
                }
                tell.send(*size).unwrap();
                words.recv().unwrap();
            }
        };
        let thread = Builder::new().name(name.to_owned()).spawn(work).unwrap();
        queued.1.recv().unwrap();
        Named { told, has, thread }
    }

    #[test]
    fn room_is_given_in_the_order_of_names() {
        // Whoever comes first holds the others up until all are there.
        let first = begin("0", &[WHOLE]);
        assert_eq!(first.has.recv().unwrap(), WHOLE);
        let alone = begin("d", &[WHOLE]);
        let after = begin("e", &[1]);
        let [wide, small, clears] =
            [("a", &[1, 2][..]), ("b", &[1]), ("c", &[1, WHOLE])].map(|(name, sizes)| begin(name, sizes));
        let has = |of: &Named| of.has.recv_timeout(Duration::from_secs(10)).unwrap();
        let none = |of: &Named| assert!(of.has.try_recv().is_err());
        let end = |of: Named| {
            of.told.send(()).unwrap();
            of.thread.join().unwrap();
        };
        end(first);
        for named in [&wide, &small, &clears] {
            assert_eq!(has(named), 1);
        }
        // Who wants more waits for it, and has given back what it had.
        clears.told.send(()).unwrap();
        wide.told.send(()).unwrap();
        assert_eq!(has(&wide), 2);
        end(small);
        none(&clears);
        end(wide);
        assert_eq!(has(&clears), WHOLE);
        // Small enough for what is free, but not its turn.
        none(&alone);
        none(&after);
        end(clears);
        assert_eq!(has(&alone), WHOLE);
        none(&after);
        end(alone);
        assert_eq!(has(&after), 1);
        end(after);
    }
}
