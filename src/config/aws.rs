//! The settings of AWS KMS: how it is reached, and how its troubles are kept from the service.

use serde::{Deserialize, Deserializer};

use super::ConfigError;
use crate::kms::{aws, guarded, ring};

macro_rules! one_section_of_several_options {
    (
        $(#[$section_doc:meta])* $section:ident:
        $($part:ident gives $options:ty { $($(#[$doc:meta])* $field:ident: $type:ty,)* })*
    ) => {
        $(#[$section_doc])*
        #[derive(Clone, Debug, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $section {
            $($($(#[$doc])* pub $field: $type,)*)*
        }

        impl Default for $section {
            fn default() -> Self {
                $(let $part = <$options>::default();)*
                Self { $($($field: $part.$field,)*)* }
            }
        }

        impl $section {
            $(
                #[doc = concat!("The options of [`", stringify!($options), "`].")]
                pub fn $part(&self) -> $options {
                    <$options>::from(self)
                }
            )*
        }

        $(impl From<&$section> for $options {
            fn from(settings: &$section) -> Self {
                Self { $($field: settings.$field.clone(),)* }
            }
        })*
    };
}

one_section_of_several_options! {
    /// AWS KMS: see [`aws::Options`], [`ring::Options`] and [`guarded::Options`].
    AwsSettings:
    reach gives aws::Options {
        /// The endpoint of KMS, where it is not AWS's public one; `{region}` stands for the KEK's region.
        kms_endpoint: Option<String>,
        /// The endpoint of STS, for KEKs with a role to assume; `{region}` stands for the KEK's region.
        sts_endpoint: Option<String>,
        /// Whether AWS's FIPS endpoints are used.
        fips: Option<bool>,
        /// How long making a connection may take.
        connect_ms_max: u64,
        /// After how long without use a connection is closed, and its buffers wiped.
        connection_idle_secs_max: u64,
        /// How long the session of an assumed role lasts.
        role_session_secs: u64,
    }
    rings gives ring::Options {
        /// AWS regions, the nearest first: a list, or text with commas.
        #[serde(deserialize_with = "list_or_commas")]
        regions_nearest: Vec<String>,
        /// After how long without an answer of one KEK the next one is asked beside it.
        hedge_ms: u64,
        /// How long a new data key waits for its further wrapped forms.
        wrap_ms_max: u64,
    }
    guard gives guarded::Options {
        /// How long one call may take, tries and waits included.
        call_ms_max: u64,
        /// How long one try may take.
        try_ms_max: u64,
        /// How many tries a call has at most.
        tries_max: u32,
        /// The longest wait before the second try.
        backoff_ms: u64,
        /// The longest wait between two tries.
        backoff_ms_max: u64,
        /// How many calls to one region are in flight at most.
        in_flight_max: usize,
        /// How many calls to one region are sent a second at most.
        calls_per_sec_max: u32,
        /// How many outages in a row open a region's circuit.
        breaker_failures: u32,
        /// How long an open circuit stays open at first.
        breaker_open_ms: u64,
        /// The longest that it stays open.
        breaker_open_ms_max: u64,
    }
}

/// The shortest and the longest session that AWS grants for an assumed role, in seconds.
const ROLE_SESSION_SECS: std::ops::RangeInclusive<u64> = 900..=43_200;

impl AwsSettings {
    /// What single values cannot tell.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let positive = [
            ("aws.connect_ms_max", self.connect_ms_max),
            ("aws.connection_idle_secs_max", self.connection_idle_secs_max),
            ("aws.hedge_ms", self.hedge_ms),
            ("aws.wrap_ms_max", self.wrap_ms_max),
            ("aws.call_ms_max", self.call_ms_max),
            ("aws.try_ms_max", self.try_ms_max),
            ("aws.tries_max", self.tries_max.into()),
            ("aws.in_flight_max", self.in_flight_max as u64),
            ("aws.calls_per_sec_max", self.calls_per_sec_max.into()),
            ("aws.breaker_failures", self.breaker_failures.into()),
            ("aws.breaker_open_ms", self.breaker_open_ms),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Invalid(format!("{name} is 0: use 1 or more")));
        }
        if !ROLE_SESSION_SECS.contains(&self.role_session_secs) {
            return Err(ConfigError::Invalid(format!(
                "aws.role_session_secs is {}: AWS grants {} to {}",
                self.role_session_secs,
                ROLE_SESSION_SECS.start(),
                ROLE_SESSION_SECS.end()
            )));
        }
        for (name, endpoint) in [("kms", &self.kms_endpoint), ("sts", &self.sts_endpoint)] {
            check_endpoint(name, endpoint.as_deref())?;
            if endpoint.is_some() && self.fips == Some(true) {
                // The SDK would refuse every single call.
                return Err(ConfigError::Invalid(format!(
                    "aws.fips chooses AWS's own FIPS endpoints, and aws.{name}_endpoint another one: leave out \
                     aws.fips, and set aws.kms_endpoint and aws.sts_endpoint to FIPS endpoints"
                )));
            }
        }
        Ok(())
    }
}

/// The SDK would end the process with a panic over an endpoint that is no URL.
fn check_endpoint(name: &str, endpoint: Option<&str>) -> Result<(), ConfigError> {
    let Some(endpoint) = endpoint else { return Ok(()) };
    let tried = endpoint.replace("{region}", "region");
    let valid = tried.parse::<http::Uri>().is_ok_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty())
    });
    if valid {
        return Ok(());
    }
    Err(ConfigError::Invalid(format!(
        "aws.{name}_endpoint is {endpoint:?}: use a URL such as https://{name}.{{region}}.example.com"
    )))
}

/// A list, as the file writes it, or text with commas, as the environment has to.
fn list_or_commas<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        List(Vec<String>),
        Text(String),
    }
    let names = match Either::deserialize(deserializer)? {
        Either::List(names) => names,
        Either::Text(text) => text.split(',').map(str::to_owned).collect(),
    };
    Ok(names.iter().map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect())
}

#[cfg(test)]
mod tests {
    use super::super::{Settings, Variables};

    fn load<const N: usize>(variables: [(&str, &str); N]) -> Result<Settings, super::ConfigError> {
        Settings::load(None, &Variables::of(variables))
    }

    #[test]
    fn regions_come_from_a_list_or_from_text_with_commas() {
        let settings = load([("KEYFOLD_AWS__REGIONS_NEAREST", "eu-west-1, eu-central-1")]).unwrap();
        assert_eq!(settings.aws.rings().regions_nearest, ["eu-west-1", "eu-central-1"]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keyfold.toml");
        std::fs::write(&path, "[aws]\nregions_nearest = [\"us-east-1\"]\ncall_ms_max = 7\n").unwrap();
        let settings = Settings::load(Some(&path), &Variables::default()).unwrap();
        assert_eq!(settings.aws.rings().regions_nearest, ["us-east-1"]);
        assert_eq!(settings.aws.guard().call_ms_max, 7);
    }

    #[test]
    fn values_that_make_no_sense_are_refused_by_name() {
        for (variable, value, named) in [
            ("KEYFOLD_AWS__CALLS_PER_SEC_MAX", "0", "aws.calls_per_sec_max"),
            ("KEYFOLD_AWS__ROLE_SESSION_SECS", "899", "aws.role_session_secs"),
            ("KEYFOLD_AWS__ROLE_SESSION_SECS", "43201", "aws.role_session_secs"),
            ("KEYFOLD_AWS__KMS_ENDPOINT", "kms.example.com", "aws.kms_endpoint"),
            ("KEYFOLD_AWS__STS_ENDPOINT", "ftp://example.com", "aws.sts_endpoint"),
        ] {
            let error = load([(variable, value)]).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        let endpoint = "https://vpce-1.kms.{region}.vpce.amazonaws.com";
        let both = [("KEYFOLD_AWS__FIPS", "true"), ("KEYFOLD_AWS__KMS_ENDPOINT", endpoint)];
        let error = load(both).unwrap_err().to_string();
        assert!(error.contains("aws.fips") && error.contains("aws.kms_endpoint"), "{error}");
        assert!(load([("KEYFOLD_AWS__FIPS", "false"), both[1]]).is_ok());
        assert!(
            load([("KEYFOLD_AWS__KMS_ENDPOINT", endpoint), ("KEYFOLD_AWS__ROLE_SESSION_SECS", "900")])
                .is_ok()
        );
    }

    #[test]
    fn what_a_request_may_wait_for_the_kms_ends_before_its_own_deadline_does() {
        let in_all_ms = |settings: &Settings| {
            let aws = &settings.aws;
            settings.pool.tenant_kms_wait_ms_max + 7 * aws.hedge_ms + aws.call_ms_max + aws.wrap_ms_max
        };
        let defaults = Settings::default();
        assert_eq!(in_all_ms(&defaults), 14_500);
        for (secs, shortened) in [("1", true), ("16", true), ("17", false), ("30", false)] {
            let settings = load([("KEYFOLD_HTTP__REQUEST_SECS_MAX", secs)]).unwrap();
            let most = secs.parse::<u64>().unwrap() * 900;
            assert!(in_all_ms(&settings) <= most, "{secs}: {} ms", in_all_ms(&settings));
            assert_eq!(settings.aws.call_ms_max < defaults.aws.call_ms_max, shortened, "{secs}");
            assert!(settings.aws.hedge_ms > 0 && settings.aws.wrap_ms_max > 0);
        }
        let hour = load([("KEYFOLD_AWS__CALL_MS_MAX", "3600000")]).unwrap();
        assert!(hour.aws.call_ms_max < 27_000, "{}", hour.aws.call_ms_max);
        let none = [("KEYFOLD_POOL__TENANT_KMS_WAIT_MS_MAX", "0"), ("KEYFOLD_HTTP__REQUEST_SECS_MAX", "1")];
        assert_eq!(load(none).unwrap().pool.tenant_kms_wait_ms_max, 0);
        // As large as a file can hold it: nothing overflows.
        let most = "9223372036854775807";
        let huge = [("KEYFOLD_AWS__CALL_MS_MAX", most), ("KEYFOLD_AWS__HEDGE_MS", most)];
        assert!(in_all_ms(&load(huge).unwrap()) <= 27_000);
    }
}
