use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Bounds how often something that a guest can repeat is logged.
///
/// Lets `burst` events through per `interval`; the first event of a new interval tells how many were swallowed.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    interval: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    window_start: Option<Instant>,
    passed: u32,
    swallowed: u64,
}

impl RateLimit {
    /// At most `burst` events per `interval`.
    pub const fn new(burst: u32, interval: Duration) -> Self {
        let state = State { window_start: None, passed: 0, swallowed: 0 };
        Self { burst, interval, state: Mutex::new(state) }
    }

    /// Ten events per five seconds: the limit used for anything a guest can trigger.
    pub const fn guest_default() -> Self {
        Self::new(10, Duration::from_secs(5))
    }

    /// `Some(n)` if the event may be logged, where `n` earlier ones were swallowed since the last logged one.
    pub fn allow(&self) -> Option<u64> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&self, now: Instant) -> Option<u64> {
        // A poisoned lock only means that a logging thread panicked; the counters are still usable.
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let expired = state.window_start.is_none_or(|start| now.duration_since(start) >= self.interval);
        if expired {
            state.window_start = Some(now);
            state.passed = 0;
        }
        if state.passed >= self.burst {
            state.swallowed += 1;
            return None;
        }
        state.passed += 1;
        Some(std::mem::take(&mut state.swallowed))
    }
}

/// Logs a warning that a guest can trigger, at the rate a [`RateLimit`] static at the call site allows.
///
/// Takes what `tracing::warn!` takes after a format string; appends how many messages were swallowed.
#[macro_export]
macro_rules! warn_limited {
    ($($arg:tt)+) => {{
        static LIMIT: $crate::RateLimit = $crate::RateLimit::guest_default();
        if let Some(swallowed) = LIMIT.allow() {
            $crate::__private::warn_with_count(swallowed, format_args!($($arg)+));
        }
    }};
}

/// [`warn_limited`] for an error.
#[macro_export]
macro_rules! error_limited {
    ($($arg:tt)+) => {{
        static LIMIT: $crate::RateLimit = $crate::RateLimit::guest_default();
        if let Some(swallowed) = LIMIT.allow() {
            $crate::__private::error_with_count(swallowed, format_args!($($arg)+));
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swallows_beyond_the_burst_and_reports_it_later() {
        let limit = RateLimit::new(2, Duration::from_secs(5));
        let start = Instant::now();
        let answers: Vec<_> = (0..5).map(|_| limit.allow_at(start)).collect();
        assert_eq!(answers, [Some(0), Some(0), None, None, None]);
        assert_eq!(limit.allow_at(start + Duration::from_secs(5)), Some(3));
        assert_eq!(limit.allow_at(start + Duration::from_secs(5)), Some(0));
    }
}
