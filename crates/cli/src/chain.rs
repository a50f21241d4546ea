use std::error::Error;
use std::fmt;

/// An error with all its causes: `message: cause: cause of that`. Causes that a message already holds are not said twice.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'e>(pub &'e dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        let mut next = self.0.source();
        while let Some(cause) = next {
            let text = cause.to_string();
            if !said.contains(&text) {
                said.push_str(": ");
                said.push_str(&text);
            }
            next = cause.source();
        }
        f.write_str(&said)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Outer(&'static str, Option<Box<Outer>>);

    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Outer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|cause| cause as _)
        }
    }

    #[test]
    fn every_cause_is_said_and_none_twice() {
        let chain = |texts: &[&'static str]| {
            let nest = |inner: Option<Box<Outer>>, text: &&'static str| Some(Box::new(Outer(text, inner)));
            let error = texts.iter().rev().fold(None, nest).unwrap();
            Chain(&*error).to_string()
        };
        assert_eq!(chain(&["cannot open x"]), "cannot open x");
        assert_eq!(chain(&["cannot open x", "in the way", "no room"]), "cannot open x: in the way: no room");
        assert_eq!(chain(&["console: no room; give it some", "no room"]), "console: no room; give it some");
    }
}
