//! Values of flags that are no sizes: seconds, modes of files, the time to poll.

use std::time::Duration;

use crate::session::POLL_TIME_DEFAULT;

/// Seconds, with a fraction if need be. A day is the limit: deadlines must not overflow.
pub fn seconds(text: &str) -> Result<Duration, String> {
    const LONGEST_SECONDS: f64 = 86_400.0;
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=LONGEST_SECONDS).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        Ok(_) | Err(_) => Err(format!("{text:?} is not a number of seconds from 0 to {LONGEST_SECONDS}")),
    }
}

/// Permission bits only: sockets have no use for the others.
pub fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        Ok(_) | Err(_) => Err("expected permissions in octal from 0 to 777, as in 660".to_owned()),
    }
}

/// How long to look at a socket before sleeping: `auto`, `off`, or microseconds.
pub fn poll(text: &str) -> Result<Duration, String> {
    match text {
        "auto" => Ok(POLL_TIME_DEFAULT),
        "off" => Ok(Duration::ZERO),
        // A millisecond: more would only burn a processor that sleeping leaves to others.
        number => match number.parse::<u64>() {
            Ok(micros) if micros <= 1000 => Ok(Duration::from_micros(micros)),
            Ok(_) | Err(_) => Err("expected auto, off, or microseconds up to 1000".to_owned()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poll_times() {
        assert_eq!(poll("auto"), Ok(POLL_TIME_DEFAULT));
        assert_eq!(poll("off"), Ok(Duration::ZERO));
        assert_eq!(poll("20"), Ok(Duration::from_micros(20)));
        for text in ["", "on", "-1", "1001", "20us"] {
            assert!(poll(text).is_err(), "{text}");
        }
    }

    #[test]
    fn permissions() {
        assert_eq!(mode("660"), Ok(0o660));
        assert_eq!(mode("0600"), Ok(0o600));
        for text in ["", "rw", "888", "1777", "-1"] {
            assert!(mode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        assert_eq!(seconds("0"), Ok(Duration::ZERO));
        for text in ["", "-1", "nan", "inf", "86401", "5s"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
