//! Settings with a fixed set of named values.

use std::fmt;

/// A setting with a fixed set of named values.
pub(super) trait Choice: Copy + PartialEq + 'static {
    const ALL: &[(&str, Self)];
}

macro_rules! choice {
    ($(#[$outer:meta])* $name:ident { $($(#[$meta:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum $name { $($(#[$meta])* #[doc = concat!("`", $text, "`")] $variant,)+ }

        impl Choice for $name {
            const ALL: &[(&str, Self)] = &[$(($text, Self::$variant)),+];
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $text),+ })
            }
        }
    };
}

choice! {
    /// The least severe level that is logged.
    Level {
        Error = "error",
        Warn = "warn",
        #[default]
        Info = "info",
        Debug = "debug",
        Trace = "trace",
    }
}

choice! {
    /// The format of a log line.
    LogFormat {
        #[default]
        Text = "text",
        Json = "json",
    }
}

choice! {
    /// How the exporter logs in to `RabbitMQ` (Celery's `broker_login_method`).
    LoginMethod {
        /// User name and password.
        #[default]
        Plain = "PLAIN",
        /// User name and password, in AMQP's own encoding.
        AmqPlain = "AMQPLAIN",
        /// The client certificate: the server derives the user name from it.
        External = "EXTERNAL",
    }
}
