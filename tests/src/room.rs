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
