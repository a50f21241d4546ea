//! The lab's end-to-end cases, and what both sides of them share: see `docs/lab.md`.
