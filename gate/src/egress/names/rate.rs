//! A bound on how often.

use std::time::Duration;

use tokio::time::Instant;

/// A token bucket, kept as the time at which it is full again (the generic cell rate algorithm, ATM Forum TM 4.0 §4.4).
#[derive(Debug)]
pub struct Bucket {
    each: Duration,
    burst: Duration,
    full_at: Option<Instant>,
}

impl Bucket {
    /// `burst` at once, and `per_second` for as long as it goes on; 0 of either lets nothing through.
    pub fn new(burst: u32, per_second: u32) -> Self {
        let each = if burst == 0 {
            Duration::MAX
        } else {
            Duration::from_secs(1).checked_div(per_second).unwrap_or(Duration::MAX)
        };
        Self { each, burst: each.saturating_mul(burst), full_at: None }
    }

    /// Whether there is one left, which is then taken.
    pub fn take(&mut self, now: Instant) -> bool {
        let from = self.full_at.map_or(now, |full_at| full_at.max(now));
        let Some(full_at) = from.checked_add(self.each) else { return false };
        if full_at.duration_since(now) > self.burst {
            return false;
        }
        self.full_at = Some(full_at);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_a_rate() {
        let mut bucket = Bucket::new(10, 5);
        let start = Instant::now();
        let taken = |bucket: &mut Bucket, at: Duration| (0..100).filter(|_| bucket.take(start + at)).count();
        assert_eq!(taken(&mut bucket, Duration::ZERO), 10);
        assert_eq!(taken(&mut bucket, Duration::from_millis(199)), 0);
        assert_eq!(taken(&mut bucket, Duration::from_millis(200)), 1);
        assert_eq!(taken(&mut bucket, Duration::from_millis(1200)), 5);
        assert_eq!(taken(&mut bucket, Duration::from_secs(3600)), 10);
        for (burst, per_second) in [(0, 5), (10, 0), (0, 0)] {
            assert_eq!(taken(&mut Bucket::new(burst, per_second), Duration::ZERO), 0, "{burst} {per_second}");
        }
    }
}
