//! `cluster algorithms`: what can be trained, from the same schema that validates job files.

use api::schema::{Direction, Hyperparameter, Kind};

use crate::args::{Algorithms, Global};
use crate::error::Result;
use crate::output;

/// Lists all algorithms, or describes one.
pub fn show(global: &Global, args: &Algorithms) -> Result<()> {
    let Some(name) = &args.name else {
        let all = algorithms::algorithms();
        if global.json {
            all.iter().for_each(output::json);
            return Ok(());
        }
        let rows = all.iter().map(|a| vec![a.name.clone(), a.description.clone()]).collect();
        output::table(&["name", "description"], rows, "no algorithms");
        return Ok(());
    };
    let schema = algorithms::algorithm(name)?.schema();
    if global.json {
        output::json(&schema);
        return Ok(());
    }
    output::line(&format!("{}: {}", schema.name, schema.description));
    output::line("\n[channels]");
    let rows = schema
        .channels
        .iter()
        .map(|channel| {
            let need = if channel.required { "required" } else { "optional" };
            let types = channel.content_types.join(", ");
            vec![channel.name.clone(), need.into(), types, channel.description.clone()]
        })
        .collect();
    output::table(&["name", "", "content types", "description"], rows, "none");
    output::line("\n[hyperparameters]");
    let rows = schema
        .hyperparameters
        .iter()
        .map(|h| vec![h.name.clone(), range(h), h.default.to_string(), h.description.clone()])
        .collect();
    output::table(&["name", "values", "default", "description"], rows, "none");
    output::line("\nmetrics");
    let rows = schema
        .metrics
        .iter()
        .map(|metric| {
            let better = match metric.direction {
                Direction::Minimize => "small is better",
                Direction::Maximize => "large is better",
            };
            vec![metric.name.clone(), better.into(), metric.description.clone()]
        })
        .collect();
    output::table(&["name", "", "description"], rows, "none");
    output::line(&format!("\nserves: {}", schema.request_types.join(", ")));
    Ok(())
}

fn range(parameter: &Hyperparameter) -> String {
    match &parameter.kind {
        Kind::Bool => "true, false".into(),
        Kind::Integer { min, max } => format!("{min} … {max}"),
        Kind::Float { min, max, .. } => format!("{min} … {max}"),
        Kind::Choice { options } => options.join(", "),
        Kind::Text => "text".into(),
    }
}
