//! Logs: one JSON object per line on standard output, with field names of the Elastic Common Schema.

use std::{fmt, io::Write};

use jiff::Timestamp;
use serde_json::{Map, Value};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{
    EnvFilter, Layer,
    layer::{Context, SubscriberExt},
    registry::{LookupSpan, Scope},
    util::SubscriberInitExt,
};

/// Sends this process's logs to standard output; `RUST_LOG` filters them.
pub fn init() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,kube=warn"));
    tracing_subscriber::registry()
        .with(Ecs.with_filter(filter))
        .init();
}

struct Ecs;

struct Fields(Map<String, Value>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Ecs {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields(Map::new());
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut line = Fields(Map::new());
        for span in context.event_scope(event).into_iter().flat_map(Scope::from_root) {
            if let Some(Fields(fields)) = span.extensions().get::<Fields>() {
                // Spans of libraries have names of their own.
                let ours = fields.iter().filter(|(name, _)| name.starts_with("labels."));
                line.0
                    .extend(ours.map(|(name, value)| (name.clone(), value.clone())));
            }
        }
        event.record(&mut line);
        let metadata = event.metadata();
        line.set("@timestamp", Timestamp::now().to_string());
        line.set("ecs.version", "8.17");
        line.set("log.level", metadata.level().as_str().to_lowercase());
        line.set("log.logger", metadata.target());
        line.set("service.name", "exchange-operator");
        line.set("service.version", env!("CARGO_PKG_VERSION"));
        let mut text = Value::Object(line.0).to_string();
        text.push('\n');
        // Nobody is left to tell when standard output is gone.
        let _ = std::io::stdout().lock().write_all(text.as_bytes());
    }
}

impl Fields {
    fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field.name(), value);
    }
}
